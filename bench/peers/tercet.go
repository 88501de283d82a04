package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"tercet.dev/tercet/bench"
)

// tercet is the program under test, or bench/baseline, which is started in the same way.
type tercet struct {
	// as is the name, binary the program.
	as, binary string
	says       string
	// valkey has the servers listen for RESP as well.
	valkey bool
	// extra are further arguments of each server.
	extra []string
}

func (t tercet) name() string    { return t.as }
func (t tercet) promise() string { return t.says }

func (t tercet) missing() string {
	if _, err := which(t.binary); err != nil {
		return "make bench-build"
	}
	return ""
}

type tercetCluster struct {
	t         tercet
	processes []*process
	http      []string // addresses
	endpoints []string
	valkey    []string
	noRESP    string // why there is no way in by RESP
	text      string
}

// The zones of the nodes n1, n2, n3.
var tercetZones = [3]string{"a", "b", "c"}

func (t tercet) start(ctx context.Context, h *host, dir string) (cluster, error) {
	binary, err := which(t.binary)
	if err != nil {
		return nil, err
	}
	ports, err := freePorts(4 * 3)
	if err != nil {
		return nil, err
	}
	c := &tercetCluster{t: t}
	var peers []string
	for i := range 3 {
		peers = append(peers, fmt.Sprintf("n%d=%s", i+1, loopback(ports[4*i])))
	}
	for i := range 3 {
		id, own := fmt.Sprintf("n%d", i+1), ports[4*i:4*i+4]
		args := []string{
			"server", "--node-id", id, "--zone", tercetZones[i], "--data", dir + "/" + id, "--peer", loopback(own[0]),
			"--http", loopback(own[1]), "--bench-listen", loopback(own[2]), "--peers", strings.Join(peers, ","),
		}
		if t.valkey {
			args = append(args, "--valkey", loopback(own[3]), "--push-allow", "127.0.0.0/8")
			c.valkey = append(c.valkey, loopback(own[3]))
		}
		p, err := h.start(dir, id, nil, binary, append(args, t.extra...)...)
		if err != nil {
			c.stop()
			return nil, err
		}
		c.processes = append(c.processes, p)
		c.http, c.endpoints = append(c.http, loopback(own[1])), append(c.endpoints, loopback(own[2]))
	}
	for i, p := range c.processes {
		err := p.await(ctx, "all zones were in sync", func() error {
			var doc clusterDocument
			if err := getJSON(ctx, c.http[i], "/v1/cluster", &doc); err != nil {
				return err
			}
			if len(doc.InSync) < 3 || doc.Leader == "" {
				return fmt.Errorf("leader %q, in sync %v", doc.Leader, doc.InSync)
			}
			return nil
		})
		if err != nil {
			c.stop()
			return nil, err
		}
	}
	var node struct{ Version string }
	if err := getJSON(ctx, c.http[0], "/v1/node", &node); err != nil {
		c.stop()
		return nil, err
	}
	c.text = t.as + " " + node.Version
	c.noRESP = "the servers have no such port"
	if t.valkey {
		c.noRESP = ""
		if _, err := redisCommand(ctx, c.valkey[0], "XADD", "bench-probe", "*", "a", "b"); err != nil {
			c.noRESP = "XADD: " + err.Error()
		}
	}
	return c, nil
}

// refuses implements refusing.
func (c *tercetCluster) refuses(way string) string {
	if way == wayRESP {
		return c.noRESP
	}
	return ""
}

type clusterDocument struct {
	Leader string
	InSync []string
}

// getJSON asks a server.
func getJSON(ctx context.Context, addr, path string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

func (c *tercetCluster) version() string      { return c.text }
func (c *tercetCluster) pids() map[string]int { return pidsOf(c.processes) }
func (c *tercetCluster) stop()                { stopAll(0, c.processes...) }

// leader returns the leader's number.
func (c *tercetCluster) leader(ctx context.Context) (int, error) {
	for _, addr := range c.http {
		var doc clusterDocument
		if err := getJSON(ctx, addr, "/v1/cluster", &doc); err != nil {
			return 0, err
		}
		for i, p := range c.processes {
			if p.name == doc.Leader {
				return i, nil
			}
		}
	}
	return 0, errors.New("no server leads")
}

func (c *tercetCluster) run(ctx context.Context, w bench.Workload, way string, hooks bench.Hooks) (*bench.Result, error) {
	i, err := c.leader(ctx)
	if err != nil {
		return nil, err
	}
	switch way {
	case wayLeader:
		return bench.RunRemote(ctx, c.endpoints[i], w, hooks)
	case wayHTTP:
		return drive(ctx, w, &bench.HTTPDriver{Addrs: c.http[i : i+1], Workload: w}, hooks)
	case wayPush:
		d := &bench.PushDriver{HTTPDriver: bench.HTTPDriver{Addrs: c.http[i : i+1], Workload: w}}
		res, err := drive(ctx, w, d, hooks)
		return res, errors.Join(err, d.Close())
	case wayRESP:
		return drive(ctx, w, &bench.RESPDriver{Addrs: c.valkey[i : i+1], Workload: w}, hooks)
	}
	return nil, fmt.Errorf("no way %q into %s", way, c.t.as)
}

// clean deletes the topics. The baseline has no such call, and leaves the messages to their retention of 60 s.
func (c *tercetCluster) clean(ctx context.Context, w bench.Workload) error {
	if c.t.as == sysRaftWAL {
		return nil
	}
	i, err := c.leader(ctx)
	if err != nil {
		return err
	}
	for _, topic := range topicsOf(w) {
		req, err := http.NewRequestWithContext(ctx, http.MethodDelete, "http://"+c.http[i]+"/v1/topics/"+topic, nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode/100 != 2 && resp.StatusCode != http.StatusNotFound { // nothing may have been published to it
			return fmt.Errorf("DELETE %s: %s", req.URL.Path, resp.Status)
		}
	}
	return nil
}
