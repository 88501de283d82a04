package compat

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"
)

// conn is a client that does nothing of its own accord: what a test sends is what goes out.
type conn struct {
	nc net.Conn
	r  *bufio.Reader
}

// patience bounds every reply, against hanging.
const patience = 2 * time.Minute

func connect(addr string) (*conn, error) {
	nc, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return nil, err
	}
	return &conn{nc, bufio.NewReader(nc)}, nc.SetDeadline(time.Now().Add(patience))
}

func dial(t *testing.T, addr string) *conn {
	t.Helper()
	c, err := connect(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.nc.Close() })
	return c
}

func encode(args ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(args))
	for _, a := range args {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(a), a)
	}
	return b.String()
}

// send writes commands, words separated by blanks, without waiting.
func (c *conn) send(commands ...string) error {
	var b strings.Builder
	for _, line := range commands {
		b.WriteString(encode(strings.Fields(line)...))
	}
	_, err := io.WriteString(c.nc, b.String())
	return err
}

// reply reads one reply as text: lists in brackets, errors with their minus.
func (c *conn) reply() (string, error) {
	line, err := c.r.ReadString('\n')
	if err != nil {
		return "", err
	}
	kind, rest := line[0], strings.TrimRight(line[1:], "\r\n")
	switch kind {
	case '+', ':':
		return rest, nil
	case '-':
		return "-" + rest, nil
	}
	n, err := strconv.Atoi(rest)
	switch {
	case err != nil:
		return "", err
	case n < 0:
		return "nil", nil
	case kind == '$':
		b := make([]byte, n+2)
		_, err := io.ReadFull(c.r, b)
		return string(b[:n]), err
	}
	parts := make([]string, n)
	for i := range parts {
		if parts[i], err = c.reply(); err != nil {
			return "", err
		}
	}
	return "[" + strings.Join(parts, " ") + "]", nil
}

// do sends one command and returns its reply.
func (c *conn) do(line string) (string, error) {
	if err := c.nc.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if err := c.send(line); err != nil {
		return "", err
	}
	return c.reply()
}

// must is do, and fails the test.
func (c *conn) must(t *testing.T, line string) string {
	t.Helper()
	got, err := c.do(line)
	if err != nil || strings.HasPrefix(got, "-") {
		t.Fatalf("%s: %s, %v", line, got, err)
	}
	return got
}

// settled repeats a command that changes nothing when repeated until an election is over.
func settled(t *testing.T, addr, line string) string {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		c, err := connect(addr)
		var got string
		if err == nil {
			got, err = c.do(line)
			c.nc.Close()
		}
		if err == nil && !strings.HasPrefix(got, "-") {
			return got
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %s, %v", line, got, errors.Join(err))
		}
	}
}
