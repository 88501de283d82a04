package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"tercet.dev/tercet/bench"
)

// redis is Debian's package: streams on one master and two replicas, each of which syncs its append-only file before
// it answers anything.
type redis struct{}

const redisReplicas = 2

func (redis) name() string { return "redis" }

func (redis) promise() string {
	return "streams; appendfsync always on the master and two replicas, each write followed by WAIT 2: on the disks of all three; the file is not rewritten during a run"
}

func (redis) missing() string {
	if _, err := which("redis-server"); err != nil {
		return "apt-get install redis-server"
	}
	return ""
}

type redisCluster struct {
	addrs     []string
	processes []*process
	text      string
}

func (r redis) start(ctx context.Context, h *host, dir string) (cluster, error) {
	binary, err := which("redis-server")
	if err != nil {
		return nil, err
	}
	ports, err := freePorts(1 + redisReplicas)
	if err != nil {
		return nil, err
	}
	c := &redisCluster{text: commandVersion(ctx, binary, "--version")}
	for i, port := range ports {
		args := []string{
			"--bind", "127.0.0.1", "--port", strconv.Itoa(port), "--protected-mode", "no", "--save", "",
			"--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0",
			"--repl-diskless-sync-delay", "0", "--maxclients", "4096", "--tcp-backlog", "2048",
		}
		if i > 0 {
			args = append(args, "--replicaof", "127.0.0.1 "+strconv.Itoa(ports[0]))
		}
		name := fmt.Sprintf("redis%d", i+1)
		p, err := h.start(dir+"/"+name, name, nil, binary, args...)
		if err != nil {
			c.stop()
			return nil, err
		}
		c.processes, c.addrs = append(c.processes, p), append(c.addrs, loopback(port))
		if err := p.await(ctx, "it listened", func() error { return dialable(loopback(port)) }); err != nil {
			c.stop()
			return nil, err
		}
	}
	// The replicas have to have caught up once before WAIT means anything.
	err = c.processes[0].await(ctx, "its replicas had caught up", func() error {
		reply, err := redisCommand(ctx, c.addrs[0], "WAIT", strconv.Itoa(redisReplicas), "1000")
		if err == nil && reply != ":"+strconv.Itoa(redisReplicas) {
			err = fmt.Errorf("WAIT answers %s", reply)
		}
		return err
	})
	if err != nil {
		c.stop()
		return nil, err
	}
	return c, nil
}

// redisCommand sends one command and returns the first line of the reply.
func redisCommand(ctx context.Context, addr string, args ...string) (string, error) {
	dialer := net.Dialer{Timeout: time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return "", err
	}
	command := fmt.Sprintf("*%d\r\n", len(args))
	for _, a := range args {
		command += fmt.Sprintf("$%d\r\n%s\r\n", len(a), a)
	}
	if _, err := conn.Write([]byte(command)); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	line = strings.TrimSpace(line)
	if err == nil && strings.HasPrefix(line, "-") {
		err = errors.New(line)
	}
	return line, err
}

// commandVersion is the first line that a command prints.
func commandVersion(ctx context.Context, binary string, args ...string) string {
	out, err := exec.CommandContext(ctx, binary, args...).Output()
	if err != nil {
		return err.Error()
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line)
}

func (c *redisCluster) version() string { return c.text }

func (c *redisCluster) pids() map[string]int { return pidsOf(c.processes) }

// pidsOf names processes.
func pidsOf(ps []*process) map[string]int {
	pids := map[string]int{}
	for _, p := range ps {
		pids[p.name] = p.pid()
	}
	return pids
}

func (c *redisCluster) run(ctx context.Context, w bench.Workload, _ string, hooks bench.Hooks) (*bench.Result, error) {
	for _, topic := range topicsOf(w) {
		for _, group := range groupsOf(w) {
			if _, err := redisCommand(ctx, c.addrs[0], "XGROUP", "CREATE", topic, group, "0", "MKSTREAM"); err != nil && !strings.Contains(err.Error(), "BUSYGROUP") {
				return nil, err
			}
		}
	}
	return drive(ctx, w, &bench.RESPDriver{Addrs: c.addrs[:1], Workload: w, WaitReplicas: redisReplicas}, hooks)
}

func (c *redisCluster) clean(ctx context.Context, w bench.Workload) error {
	_, err := redisCommand(ctx, c.addrs[0], append([]string{"UNLINK"}, topicsOf(w)...)...)
	return err
}

func (c *redisCluster) stop() { stopAll(0, c.processes...) }
