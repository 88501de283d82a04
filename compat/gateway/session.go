package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"tercet.dev/tercet/compat"
	"tercet.dev/tercet/compat/resp"
)

// Target is what the Valkey port passes commands on to.
var _ compat.Upstream = Target{}

// Session implements compat.Upstream: a connection to the primary, logged in.
func (t Target) Session(ctx context.Context, version int) (net.Conn, error) {
	var nc net.Conn
	var err error
	dialer := &net.Dialer{KeepAlive: 15 * time.Second}
	if t.TLS != nil {
		nc, err = (&tls.Dialer{NetDialer: dialer, Config: t.TLS}).DialContext(ctx, "tcp", t.Addr)
	} else {
		nc, err = dialer.DialContext(ctx, "tcp", t.Addr)
	}
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		_ = nc.SetDeadline(deadline)
	}
	if err := t.login(ctx, nc, version); err != nil {
		nc.Close()
		return nil, err
	}
	return nc, nc.SetDeadline(time.Time{})
}

// Login implements compat.Upstream.
func (t Target) Login(ctx context.Context) (args []string, again time.Duration, err error) {
	switch {
	case t.IAM != nil:
		c, err := t.IAM.Token(ctx)
		if err != nil {
			return nil, 0, err
		}
		return []string{"AUTH", t.IAM.User, c}, iamRelogin, nil
	case t.Username != "":
		return []string{"AUTH", t.Username, t.Password}, 0, nil
	case t.Password != "":
		return []string{"AUTH", t.Password}, 0, nil
	}
	return nil, 0, nil
}

func (t Target) login(ctx context.Context, nc net.Conn, version int) error {
	auth, _, err := t.Login(ctx)
	if err != nil {
		return err
	}
	var commands [][]string
	if auth != nil {
		commands = append(commands, auth)
	}
	if version == 3 {
		commands = append(commands, []string{"HELLO", "3"})
	}
	if t.Database > 0 {
		commands = append(commands, []string{"SELECT", strconv.Itoa(t.Database)})
	}
	_, err = exchange(nc, commands)
	return err
}

// exchange sends commands and returns the replies, the first error reply as an error. Nothing else may be on its way.
func exchange(nc net.Conn, commands [][]string) ([][]byte, error) {
	var out resp.Buffer
	for _, c := range commands {
		out.Array(len(c))
		for _, a := range c {
			out.String(a)
		}
	}
	if _, err := nc.Write(out.B); err != nil {
		return nil, err
	}
	var scan resp.Scanner
	var replies [][]byte
	buf := make([]byte, 0, 4096)
	for len(replies) < len(commands) {
		n, err := scan.Reply(buf)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			if len(buf) == cap(buf) {
				buf = append(make([]byte, 0, 2*cap(buf)), buf...)
			}
			got, err := nc.Read(buf[len(buf):cap(buf)])
			if err != nil {
				return nil, err
			}
			buf = buf[:len(buf)+got]
			continue
		}
		if buf[0] == '-' {
			return nil, errors.New(string(buf[1 : n-2]))
		}
		replies = append(replies, buf[:n:n])
		buf = buf[n:]
	}
	return replies, nil
}

// KeyTable implements compat.Upstream.
func (t Target) KeyTable(ctx context.Context) (map[string]compat.UpstreamCommand, error) {
	plain := t
	plain.Mode = Single
	c, err := plain.Dial()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	info, err := c.Do(ctx, c.B().Arbitrary("INFO", "server").ReadOnly()).ToString()
	if err != nil {
		return nil, err
	}
	if parseInfo(info)["redis_mode"] == "cluster" {
		return nil, fmt.Errorf("%s is in cluster mode, and commands are passed to a single primary only: use one with cluster mode disabled", t)
	}
	rows, err := c.Do(ctx, c.B().Arbitrary("COMMAND").ReadOnly()).ToArray()
	if err != nil {
		return nil, fmt.Errorf("COMMAND: %w", err)
	}
	table := make(map[string]compat.UpstreamCommand, len(rows))
	for _, row := range rows {
		parts, err := row.ToArray()
		if err != nil || len(parts) < 6 {
			return nil, fmt.Errorf("COMMAND answers a row of %d parts: %w", len(parts), err)
		}
		name, err := parts[0].ToString()
		if err != nil {
			return nil, err
		}
		flags, err := parts[2].AsStrSlice()
		if err != nil {
			return nil, err
		}
		var u compat.UpstreamCommand
		for _, f := range flags {
			u.Movable = u.Movable || f == "movablekeys"
		}
		for i, p := range []*int{&u.First, &u.Last, &u.Step} {
			n, err := parts[3+i].AsInt64()
			if err != nil {
				return nil, err
			}
			*p = int(n)
		}
		table[name] = u
	}
	return table, nil
}
