package compat

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/compat/internal/redistest"
)

// spread returns a key for each shard, and one that is in the slot of the first.
func spread(t *testing.T, shards redistest.Shards) (keys []string, same string) {
	t.Helper()
	for _, s := range shards {
		for i := 0; ; i++ {
			key := "k" + strconv.Itoa(i)
			if _, owner, _ := shards.Owner(key); owner == s {
				keys = append(keys, key)
				break
			}
		}
	}
	return keys, "{" + keys[0] + "}b"
}

// TestPassThroughCluster has a cluster of three shards beside the log: each command goes to the shard of its key.
func TestPassThroughCluster(t *testing.T) {
	shards := redistest.Cluster(t, 3)
	_, addr := startBeside(t, shards[0])
	c := patient(t, addr)
	keys, same := spread(t, shards)
	for i, k := range keys {
		c.want("SET "+k+" v"+strconv.Itoa(i), "+OK")
		if got := shards[i].Do("GET", k); got != "v"+strconv.Itoa(i) {
			t.Errorf("%s is %q on its shard", k, got)
		}
	}
	c.want("XADD orders * a b", "$3|7-1")
	c.want("XADD "+keys[1]+"s 1-1 a b", "$3|1-1")
	c.want("DEL "+keys[1]+"s", ":1")
	c.want("MSET "+keys[0]+" 1 "+same+" 2", "+OK")
	c.want("MGET "+keys[0]+" "+keys[1], "-CROSSSLOT Keys in request don't hash to the same slot")
	c.want("DEL "+keys[0]+" orders", "-ERR the keys of this command are on both sides: those that match order* are in the log, others on the upstream; use one command for each side")
	c.want("EVAL return{KEYS[1],redis.call('get',KEYS[1])} 1 "+keys[2], "*2|$2|"+keys[2]+"|$2|v2")

	// A script is loaded everywhere.
	sha := strings.TrimPrefix(c.do("SCRIPT", "LOAD", "return redis.call('get',KEYS[1])"), "$40|")
	for i, k := range keys {
		c.want("EVALSHA "+sha+" 1 "+k, "$"+map[bool]string{true: "1|1", false: "2|v" + strconv.Itoa(i)}[i == 0])
	}
	shards[1].Do("SCRIPT", "FLUSH")
	c.want("SCRIPT EXISTS "+sha, "*1|:0")

	// What is about all keys is about all shards.
	for i := range 300 {
		c.want("SET many:"+strconv.Itoa(i)+" x", "+OK")
	}
	c.want("DBSIZE", ":304")
	if got := c.do("KEYS", "many:*"); !strings.HasPrefix(got, "*300|") {
		t.Errorf("KEYS: %.40s", got)
	}
	if got := c.do("RANDOMKEY"); !strings.HasPrefix(got, "$") {
		t.Errorf("RANDOMKEY: %s", got)
	}
	found := map[string]bool{}
	for cursor := "0"; ; {
		words := strings.Split(c.do("SCAN", cursor, "MATCH", "many:*", "COUNT", "7"), "|")
		cursor = words[2]
		for _, w := range words[4:] {
			if strings.HasPrefix(w, "many:") {
				found[w] = true
			}
		}
		if cursor == "0" {
			break
		}
	}
	if len(found) != 300 {
		t.Errorf("SCAN found %d of 300 keys", len(found))
	}
	c.want("SCAN x", "-ERR invalid cursor")
	c.want("SELECT 0", "+OK")
	c.want("SELECT 1", "-ERR SELECT is not allowed in cluster mode")

	// Transactions are on one slot.
	c.want("MULTI", "+OK")
	c.want("ECHO a", "+QUEUED")
	c.want("DISCARD", "+OK")
	c.want("MULTI", "+OK")
	c.want("INCR "+keys[0], "+QUEUED")
	c.want("PING", "+QUEUED")
	c.want("INCR "+same, "+QUEUED")
	c.want("EXEC", "*3|:2|+PONG|:3")
	c.want("MULTI", "+OK")
	c.want("INCR "+keys[0], "+QUEUED")
	c.want("INCR "+keys[1], "-CROSSSLOT Keys in request don't hash to the same slot")
	c.want("EXEC", "-EXECABORT Transaction discarded because of previous errors.")
	c.want("MULTI", "+OK")
	c.want("GET", "-ERR wrong number of arguments for 'get' command")
	c.want("EXEC", "-EXECABORT Transaction discarded because of previous errors.")
	c.want("MULTI", "+OK")
	c.want("SET "+keys[0]+" 5", "+QUEUED")
	c.want("XADD orders * a b", "-ERR this transaction runs on the upstream, and the command is about keys of the log: use two transactions")
	c.want("DISCARD", "+OK")
	c.want("GET "+keys[0], "$1|2")

	c.want("WATCH "+keys[0], "+OK")
	c.want("WATCH "+keys[1], "-CROSSSLOT Keys that are watched together have to be on one shard")
	shards[0].Do("SET", keys[0], "changed")
	c.want("MULTI", "+OK")
	c.want("SET "+keys[0]+" 6", "+QUEUED")
	c.want("EXEC", "*-1")
	c.want("WATCH "+keys[0], "+OK")
	c.want("MULTI", "+OK")
	c.want("GET "+keys[0], "+QUEUED")
	c.want("EXEC", "*1|$7|changed")
	c.want("WATCH "+keys[0], "+OK")
	c.want("UNWATCH", "+OK")
	shards[0].Do("SET", keys[0], "again")
	c.want("MULTI", "+OK")
	c.want("GET "+keys[0], "+QUEUED")
	c.want("EXEC", "*1|$5|again")

	// Blocking reads and messages.
	for i, k := range keys {
		c.send("BLPOP", k+"{"+k+"}l", "0")
		shard := shards[i]
		redistest.Until(t, 20*time.Second, "the client to block", func() error {
			if !strings.Contains(shard.Do("INFO", "clients"), "blocked_clients:1") {
				return fmt.Errorf("not blocked")
			}
			return nil
		})
		shard.Do("LPUSH", k+"{"+k+"}l", "x")
		if got := c.reply(); !strings.HasSuffix(got, "|$1|x") {
			t.Errorf("BLPOP: %s", got)
		}
	}
	for _, version := range []string{"2", "3"} {
		kind := map[string]string{"2": "*", "3": ">"}[version]
		s := dial(t, addr)
		s.do("HELLO", version)
		s.want("SUBSCRIBE ch", kind+"3|$9|subscribe|$2|ch|:1")
		for _, shard := range shards {
			shard.Do("PUBLISH", "ch", "hi")
			if got := s.reply(); got != kind+"3|$7|message|$2|ch|$2|hi" {
				t.Errorf("message: %s", got)
			}
		}
		if version == "2" {
			s.want("PING", "*2|$4|pong|$0|")
			s.want("GET "+keys[1], "-ERR Can't execute 'get': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context")
		} else {
			s.want("PING", "+PONG")
		}
		s.want("SUBSCRIBE", "-ERR wrong number of arguments for 'subscribe' command")
		s.want("UNSUBSCRIBE", kind+"3|$11|unsubscribe|$2|ch|:0")
		for i, k := range keys {
			s.want("SSUBSCRIBE "+k, fmt.Sprintf("%s3|$10|ssubscribe|$%d|%s|:1", kind, len(k), k))
			if got := c.do("SPUBLISH", k, "m"); got != ":1" {
				t.Errorf("SPUBLISH: %s", got)
			}
			if got, want := s.reply(), fmt.Sprintf("%s3|$8|smessage|$%d|%s|$1|m", kind, len(k), k); got != want {
				t.Errorf("message of shard %d: %s, want %s", i, got, want)
			}
			s.want("SUNSUBSCRIBE "+k, fmt.Sprintf("%s3|$12|sunsubscribe|$%d|%s|:0", kind, len(k), k))
		}
		s.want("GET "+keys[2], "$2|v2")
		s.want("EVAL return{'subscribe','a',1} 0", "*3|$9|subscribe|$1|a|:1")
	}
}

// patient is a client of a test that starts many programs.
func patient(t *testing.T, addr string) *client {
	t.Helper()
	c := dial(t, addr)
	c.nc.SetDeadline(time.Now().Add(5 * time.Minute))
	return c
}

// TestPassThroughMigration moves a slot back and forth under a pipeline: replies come in order, and nothing is lost, done
// twice or overtaken.
func TestPassThroughMigration(t *testing.T) {
	shards := redistest.Cluster(t, 3)
	_, addr := startBeside(t, shards[0])
	slot, from, to := shards.Owner("{t}")
	c := patient(t, addr)
	const clients, keys, rounds = 4, 8, 6
	stop := make(chan struct{})
	done := make(chan error, clients)
	for n := range clients {
		p := patient(t, addr)
		go func() {
			counts := make([]int, keys)
			batch := func() error {
				var all []byte
				var want []string
				for i := range 64 {
					k := i % keys
					name := fmt.Sprintf("{t}:%d:%d", n, k)
					switch i % 9 {
					case 8: // a transaction, which moves as a whole
						all = append(all, encodeCommand("MULTI")...)
						all = append(all, encodeCommand("INCR", name)...)
						all = append(all, encodeCommand("INCR", name)...)
						all = append(all, encodeCommand("EXEC")...)
						counts[k] += 2
						want = append(want, "+OK", "+QUEUED", "+QUEUED", fmt.Sprintf("*2|:%d|:%d", counts[k]-1, counts[k]))
					case 4:
						all = append(all, encodeCommand("EVAL", "return redis.call('incr',KEYS[1])", "1", name)...)
						counts[k]++
						want = append(want, fmt.Sprintf(":%d", counts[k]))
					default:
						all = append(all, encodeCommand("INCR", name)...)
						counts[k]++
						want = append(want, fmt.Sprintf(":%d", counts[k]))
					}
				}
				if _, err := p.nc.Write(all); err != nil {
					return err
				}
				for i, w := range want {
					got, err := readReply(p.r)
					if got = strings.TrimSuffix(strings.ReplaceAll(got, "\r\n", "|"), "|"); err != nil {
						return err
					} else if got != w {
						return fmt.Errorf("client %d, reply %d: %s, want %s", n, i, got, w)
					}
				}
				return nil
			}
			for {
				if err := batch(); err != nil {
					done <- err
					return
				}
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
			}
		}()
	}
	// A client that blocks on a list of the slot, and one that watches.
	c.send("BLPOP", "{t}list", "0")
	for range rounds {
		m := redistest.Migrate(slot, from, to)
		for m.Move(3) > 0 && len(done) == 0 {
		}
		m.Finish()
		from, to = to, from
	}
	close(stop)
	for range clients {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	from.Do("LPUSH", "{t}list", "x")
	if got := c.reply(); got != "*2|$7|{t}list|$1|x" {
		t.Errorf("BLPOP through %d moves: %s", rounds, got)
	}
	for n := range clients {
		for k := range keys {
			name := fmt.Sprintf("{t}:%d:%d", n, k)
			if got, want := c.do("GET", name), from.Do("GET", name); !strings.HasSuffix(got, "|"+want) {
				t.Errorf("%s is %s, and %s on its shard", name, got, want)
			}
		}
	}

	// A watch does not survive a move: EXEC has to say that it does not know.
	c.want("SET {t}w 1", "+OK")
	c.want("WATCH {t}w", "+OK")
	m := redistest.Migrate(slot, from, to)
	m.Finish()
	c.want("MULTI", "+OK")
	c.want("SET {t}w 2", "+QUEUED")
	c.want("EXEC", "*-1")
	c.want("GET {t}w", "$1|1")
	c.want("WATCH {t}w", "+OK")
	c.want("MULTI", "+OK")
	c.want("SET {t}w 2", "+QUEUED")
	c.want("EXEC", "*1|+OK")
}

// TestPassThroughShardReplaced promotes a replica: the commands for its slots go there.
func TestPassThroughShardReplaced(t *testing.T) {
	shards := redistest.Cluster(t, 3)
	replica := shards.Replica(t, shards[1])
	_, addr := startBeside(t, shards[0])
	c := patient(t, addr)
	keys, _ := spread(t, shards)
	for _, k := range keys {
		c.want("SET "+k+" v", "+OK")
	}
	redistest.Until(t, 60*time.Second, "the fail-over", func() error {
		if out := replica.Do("CLUSTER", "FAILOVER"); out != "OK" && !strings.Contains(out, "replica") && !strings.Contains(out, "slave") {
			return fmt.Errorf("%s", out)
		}
		if !strings.Contains(replica.Do("INFO", "replication"), "role:master") {
			return fmt.Errorf("not promoted")
		}
		return nil
	})
	shards[1].Kill()
	redistest.Until(t, 60*time.Second, "the new shard", func() error {
		for _, k := range keys {
			if got := c.do("GET", k); got != "$1|v" {
				return fmt.Errorf("%s: %s", k, got)
			}
		}
		return nil
	})
	redistest.Until(t, 60*time.Second, "all shards", func() error {
		if got := c.do("DBSIZE"); got != ":3" {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
}
