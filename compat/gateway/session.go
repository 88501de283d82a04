package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/compat"
	"tercet.dev/tercet/compat/resp"
)

// Target is what the Valkey port passes commands on to.
var _ compat.Upstream = Target{}

// Session implements compat.Upstream: a connection to the primary, or to a shard's, logged in.
func (t Target) Session(ctx context.Context, addr string, version int) (net.Conn, error) {
	if addr != "" {
		t.Addr = addr
	}
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

// ask runs f with a connection to one server: the target's own, whatever its mode.
func (t Target) ask(f func(valkey.Client) error) error {
	t.Mode = Single
	c, err := t.Dial()
	if err != nil {
		return err
	}
	defer c.Close()
	return f(c)
}

// KeyTable implements compat.Upstream.
func (t Target) KeyTable(ctx context.Context) (table map[string]compat.UpstreamCommand, err error) {
	err = t.ask(func(c valkey.Client) error {
		rows, err := c.Do(ctx, c.B().Arbitrary("COMMAND").ReadOnly()).ToArray()
		if err != nil {
			return fmt.Errorf("COMMAND: %w", err)
		}
		table = make(map[string]compat.UpstreamCommand, 2*len(rows))
		return readCommands(table, rows)
	})
	return table, err
}

// readCommands reads COMMAND's rows, and those of subcommands within them.
func readCommands(table map[string]compat.UpstreamCommand, rows []valkey.ValkeyMessage) error {
	for _, row := range rows {
		parts, err := row.ToArray()
		if err != nil || len(parts) < 6 {
			return fmt.Errorf("COMMAND answers a row of %d parts: %w", len(parts), err)
		}
		name, err := parts[0].ToString()
		if err != nil {
			return err
		}
		flags, err := parts[2].AsStrSlice()
		if err != nil {
			return err
		}
		var u compat.UpstreamCommand
		for _, f := range flags {
			u.Movable = u.Movable || f == "movablekeys"
			u.NoMulti = u.NoMulti || f == "no_multi"
		}
		for i, p := range map[int]*int{1: &u.Arity, 3: &u.First, 4: &u.Last, 5: &u.Step} {
			n, err := parts[i].AsInt64()
			if err != nil {
				return err
			}
			*p = int(n)
		}
		if len(parts) > 7 { // from 7.0 on
			tips, err := parts[7].AsStrSlice()
			if err != nil {
				return err
			}
			for _, tip := range tips {
				switch name, value, _ := strings.Cut(tip, ":"); name {
				case "request_policy":
					u.Everywhere = value == "all_shards" || value == "all_nodes"
				case "response_policy":
					u.Fold = value
				}
			}
		}
		table[strings.ToLower(name)] = u
		if len(parts) > 9 {
			under, err := parts[9].ToArray()
			if err != nil {
				return err
			}
			if err := readCommands(table, under); err != nil {
				return err
			}
		}
	}
	return nil
}

// Shards implements compat.Upstream.
func (t Target) Shards(ctx context.Context, known []string) ([]compat.UpstreamShard, error) {
	if t.Mode == Single {
		return nil, nil
	}
	var first error
	for _, addr := range append([]string{t.Addr}, known...) {
		t.Addr, t.Others = addr, nil
		shards, err := t.shards(ctx)
		if err == nil {
			return shards, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

func (t Target) shards(ctx context.Context) (shards []compat.UpstreamShard, err error) {
	err = t.ask(func(c valkey.Client) error {
		info, err := c.Do(ctx, c.B().Arbitrary("INFO").ReadOnly()).ToString()
		if err != nil {
			return err
		}
		if parseInfo(info)["redis_mode"] != "cluster" {
			if t.Mode == Cluster {
				return fmt.Errorf("%s is not in cluster mode", t)
			}
			return nil
		}
		rows, err := c.Do(ctx, c.B().ClusterSlots().Build()).ToArray()
		if err != nil {
			return fmt.Errorf("CLUSTER SLOTS: %w", err)
		}
		if shards, err = readSlots(rows, t.Addr); err == nil && len(shards) == 0 {
			return fmt.Errorf("no shard of %s has a slot", t)
		}
		return err
	})
	return shards, err
}

// readSlots reads CLUSTER SLOTS: rows of a first and a last slot, the primary, and replicas. A primary without a host is at
// the one that answered.
func readSlots(rows []valkey.ValkeyMessage, asked string) ([]compat.UpstreamShard, error) {
	at := make(map[string]int)
	var shards []compat.UpstreamShard
	for _, row := range rows {
		parts, err := row.ToArray()
		if err != nil || len(parts) < 3 {
			return nil, fmt.Errorf("CLUSTER SLOTS answers a row of %d parts: %w", len(parts), err)
		}
		first, err1 := parts[0].AsInt64()
		last, err2 := parts[1].AsInt64()
		node, err3 := parts[2].ToArray()
		if err := errors.Join(err1, err2, err3); err != nil || len(node) < 2 {
			return nil, fmt.Errorf("CLUSTER SLOTS: a node of %d parts: %w", len(node), err)
		}
		host, _ := node[0].ToString()
		if host == "" || host == "?" {
			host, _, _ = net.SplitHostPort(asked)
		}
		port, err := node[1].AsInt64()
		if err != nil {
			return nil, err
		}
		addr := net.JoinHostPort(host, strconv.FormatInt(port, 10))
		i, ok := at[addr]
		if !ok {
			i = len(shards)
			at[addr], shards = i, append(shards, compat.UpstreamShard{Addr: addr})
		}
		shards[i].Slots = append(shards[i].Slots, [2]int{int(first), int(last)})
	}
	return shards, nil
}
