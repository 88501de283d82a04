package raft

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// Two zones are gone for good, under load: the third, whichever it is, has everything that was acknowledged with
// three zones, under another cluster id.
func TestRecoverFromEachZone(t *testing.T) {
	for _, survivor := range founders {
		t.Run(survivor, func(t *testing.T) {
			c := newCluster(t, nil)
			c.start(founders...)
			c.inSync(3)
			l := startLoad(t, 8, func() *Node { return c.node(survivor) })
			l.more(c, 300)
			for _, name := range founders {
				if name != survivor {
					c.stop(name)
				}
			}
			oldCluster := c.node(survivor).Status().ClusterID
			l.cancel()
			c.stop(survivor)
			acked := l.stop()
			for id, zones := range acked {
				if zones != 3 {
					delete(acked, id)
				}
			}
			dry, err := Recover(c.dirs[survivor], false)
			if err != nil || dry.ClusterID != oldCluster || len(dry.Lost) != 2 {
				t.Fatalf("without force: %+v, %v", dry, err)
			}
			done, err := Recover(c.dirs[survivor], true)
			if err != nil || done.ClusterID == oldCluster || done.Last < done.Applied {
				t.Fatalf("with force: %+v, %v", done, err)
			}
			c.tweak = func(cfg *Config) { cfg.Peers = nil }
			c.start(survivor)
			c.leader()
			c.inSync(1)
			s := c.node(survivor).Status()
			if s.ClusterID != done.ClusterID || len(s.Nodes) != 1 {
				t.Fatalf("recovered: %+v", s)
			}
			l.check(c, c.node(survivor))
			if r := must(t, c.node(survivor), Proposal{Command: publishCommand("load", "new")}); r.Zones != 1 {
				t.Fatalf("zones %d", r.Zones)
			}
			// A node of the old cluster does not come back by itself.
			other := founders[0]
			if other == survivor {
				other = founders[1]
			}
			c.start(other)
			c.eventually("the old node to be refused", func() bool {
				return !c.node(other).mesh.Connected(peerID(c.node(survivor).id)) && c.node(other).Ready() != nil
			})
			if s := c.node(survivor).Status(); len(s.Nodes) != 1 {
				t.Fatalf("the old node was taken in: %+v", s)
			}
			// And the recovered one starts again as what it is.
			c.stop(survivor)
			c.start(survivor)
			c.eventually("a leader", func() bool { return c.node(survivor).Ready() == nil })
		})
	}
}

func TestStartRefusals(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.Peers = nil })
	c.start("n1")
	c.leader()
	must(t, c.node("n1"), Proposal{Command: publishCommand("a", "x")})
	t.Run("in use", func(t *testing.T) {
		cfg := c.configOf("n1")
		cfg.PeerAddr = freeAddr(t)
		if err := c.startWith(cfg); !errors.Is(err, ErrLocked) {
			t.Fatalf("got %v", err)
		}
	})
	c.stop("n1")
	t.Run("another node's", func(t *testing.T) {
		cfg := c.configOf("n1")
		cfg.Name = "n2"
		if err := c.startWith(cfg); !errors.Is(err, ErrForeign) {
			t.Fatalf("got %v", err)
		}
	})
	identity := filepath.Join(c.dirs["n1"], identityName)
	raw, err := os.ReadFile(identity)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"a newer release's": `{"format":2,"name":"n1","incarnation":"00"}`,
		"another cluster's": `{"format":1,"name":"n1","incarnation":"00","cluster":"other"}`,
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(identity, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := c.startWith(c.configOf("n1")); !errors.Is(err, ErrForeign) {
				t.Fatalf("got %v", err)
			}
		})
	}
	t.Run("no identity", func(t *testing.T) {
		if err := os.Remove(identity); err != nil {
			t.Fatal(err)
		}
		if err := c.startWith(c.configOf("n1")); !errors.Is(err, ErrDamaged) {
			t.Fatalf("got %v", err)
		}
	})
	if err := os.WriteFile(identity, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Run("modes", func(t *testing.T) {
		for name, want := range map[string]os.FileMode{"": 0o700, walDirName: 0o700, storeDirName: 0o700, identityName: 0o600} {
			st, err := os.Stat(filepath.Join(c.dirs["n1"], name))
			if err != nil || st.Mode().Perm()&^want != 0 {
				t.Errorf("%q: %v, %v", name, st.Mode(), err)
			}
		}
	})
	t.Run("emptied but for the identity", func(t *testing.T) {
		for _, sub := range []string{walDirName, storeDirName} {
			if err := os.RemoveAll(filepath.Join(c.dirs["n1"], sub)); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.startWith(c.configOf("n1")); !errors.Is(err, ErrWiped) {
			t.Fatalf("got %v", err)
		}
	})
}

func TestConfigChecks(t *testing.T) {
	good := func() Config {
		return Config{Name: "n1", Dir: "d", PeerAddr: "127.0.0.1:1", Peers: []Peer{{"n1", "127.0.0.1:1"}, {"n2", "127.0.0.1:2"}}}
	}
	if c := good(); c.fill() != nil {
		t.Fatal("a good configuration is refused")
	}
	for what, spoil := range map[string]func(*Config){
		"no name":        func(c *Config) { c.Name = "" },
		"bad name":       func(c *Config) { c.Name = "a/b" },
		"no directory":   func(c *Config) { c.Dir = "" },
		"no address":     func(c *Config) { c.PeerAddr = "" },
		"peers and join": func(c *Config) { c.Join = []string{"x:1"} },
		"not listed":     func(c *Config) { c.Name = "n3" },
		"name twice":     func(c *Config) { c.Peers[1].Name = "n1" },
		"address twice":  func(c *Config) { c.Peers[1].Addr = c.Peers[0].Addr },
	} {
		c := good()
		spoil(&c)
		if c.fill() == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if d, err := ParseDurability("all"); err != nil || d != All || d.String() != "all" {
		t.Errorf("all: %v, %v", d, err)
	}
	if _, err := ParseDurability("some"); err == nil {
		t.Error("durability some: accepted")
	}
}
