package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// aboveIdleMax is what large messages may add to a node's memory (issue: 128 MiB).
const aboveIdleMax = 128 << 20

// memory returns a process's resident memory.
func memory(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Error(err)
		return 0
	}
	_, text, _ = bytes.Cut(text, []byte(" "))
	resident, _, _ := bytes.Cut(text, []byte(" "))
	pages, err := strconv.ParseInt(string(resident), 10, 64)
	if err != nil {
		t.Error(err)
	}
	return pages * int64(os.Getpagesize())
}

// patterned is a body of its own for each seed, made while it is read.
type patterned struct {
	at, size int64
	seed     byte
}

func (p *patterned) Read(b []byte) (int, error) {
	if p.at == p.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(b)), p.size-p.at))
	for i := range b[:n] {
		at := p.at + int64(i)
		b[i] = byte(at) ^ byte(at>>8) ^ byte(at>>16) ^ p.seed
	}
	p.at += int64(n)
	return n, nil
}

// TestLargeMessagesMemory: ten messages, of 100 MiB in a campaign, are sent through all nodes at once, and then
// received at once, and no node takes more than 128 MiB for it above what it takes when it has just started and done nothing: as much
// as it may take for its caches by default does not matter, since large messages pass through none. Small publishes beside them succeed, and
// an upload that breaks off leaves nothing behind after a minute of the cluster's time.
func TestLargeMessagesMemory(t *testing.T) {
	t.Run("default", func(t *testing.T) { largeMessagesMemory(t) })
	if harness.Campaign() {
		t.Run("64 MiB of caches", func(t *testing.T) { largeMessagesMemory(t, "--memory", "64MiB") })
	}
}

func largeMessagesMemory(t *testing.T, args ...string) {
	const messages = 10
	size := int64(harness.Scale(24<<20, 100<<20))
	c := harness.Start(t, harness.Options{Args: append(args, "--virtual-clock")})
	idle := map[string]int64{}
	for _, n := range c.Nodes {
		idle[n.ID] = memory(t, n.Process().PID)
	}
	watching, stop := context.WithCancel(t.Context())
	defer stop()
	peak := map[string]int64{}
	var watch sync.WaitGroup
	watch.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for watching.Err() == nil {
			for _, n := range c.Nodes {
				peak[n.ID] = max(peak[n.ID], memory(t, n.Process().PID))
			}
			<-tick.C
		}
	})
	hc := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: messages}}
	defer hc.CloseIdleConnections()
	do := func(method, url, accept string, body io.Reader, length int64) (*http.Response, error) {
		req, err := http.NewRequestWithContext(t.Context(), method, url, body)
		if err != nil {
			return nil, err
		}
		if req.ContentLength = length; length > 0 {
			req.Header.Set("Content-Type", "application/octet-stream")
		}
		if accept != "" {
			req.Header.Set("Accept", accept)
			req.Header.Set("Vqs-Visibility-Timeout-Seconds", "3600")
		}
		return hc.Do(req)
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	sent := map[[sha256.Size]byte]bool{}
	for i := range messages {
		all.Go(func() {
			var sum hash.Hash
			for done := false; !done; {
				sum = sha256.New()
				res, err := do(http.MethodPost, c.Nodes[i%3].URL()+"/api/v3/topic/large", "", io.TeeReader(&patterned{size: size, seed: byte(i)}, sum), size)
				if err != nil {
					t.Error(err)
					return
				}
				text, _ := io.ReadAll(res.Body)
				res.Body.Close()
				switch res.StatusCode {
				case http.StatusCreated:
					done = true
				case http.StatusTooManyRequests: // a disk that cannot keep up says so, and nothing was stored
				default:
					t.Errorf("send: %s: %s", res.Status, text)
					return
				}
			}
			mu.Lock()
			sent[[sha256.Size]byte(sum.Sum(nil))] = true
			mu.Unlock()
		})
	}
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	beside := 0
	for finished := false; !finished; beside++ {
		select {
		case <-done:
			finished = true
		default:
		}
		publish(t, client(t, c.Nodes[beside%3]), "small", []byte("beside"))
	}
	if len(sent) != messages {
		t.Fatalf("%d of %d messages were sent", len(sent), messages)
	}
	for i := range messages {
		all.Go(func() {
			group := c.Nodes[i%3].URL() + "/api/v3/topic/large/consumer/g"
			res, err := do(http.MethodPost, group, "multipart/mixed", nil, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer res.Body.Close()
			_, params, err := mime.ParseMediaType(res.Header.Get("Content-Type"))
			if err != nil || res.StatusCode != http.StatusOK {
				t.Errorf("receive: %s, %v", res.Status, err)
				return
			}
			part, err := multipart.NewReader(res.Body, params["boundary"]).NextRawPart()
			if err != nil {
				t.Error(err)
				return
			}
			sum := sha256.New()
			if _, err := io.Copy(sum, part); err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			known := sent[[sha256.Size]byte(sum.Sum(nil))]
			delete(sent, [sha256.Size]byte(sum.Sum(nil)))
			mu.Unlock()
			if !known {
				t.Error("a message came that was not sent, or twice")
			}
			ack, err := do(http.MethodDelete, group+"/lease/"+part.Header.Get("Vqs-Receipt-Handle"), "", nil, 0)
			if err != nil {
				t.Error(err)
				return
			}
			ack.Body.Close()
			if ack.StatusCode != http.StatusNoContent {
				t.Errorf("acknowledge: %s", ack.Status)
			}
		})
	}
	all.Wait()
	stop()
	watch.Wait()
	if len(sent) > 0 {
		t.Errorf("%d messages did not come", len(sent))
	}
	for _, n := range c.Nodes {
		above := peak[n.ID] - idle[n.ID]
		t.Logf("%s: %d MiB idle, %d MiB at most, %d MiB above; %d small messages were published beside", n.ID, idle[n.ID]>>20, peak[n.ID]>>20, above>>20, beside)
		if above > aboveIdleMax {
			t.Errorf("%s took %d MiB above idle, want at most %d", n.ID, above>>20, aboveIdleMax>>20)
		}
	}

	// An upload that breaks off.
	conn, err := net.Dial("tcp", c.Nodes[0].HTTP)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /api/v3/topic/broken HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n", 8<<20)
	if _, err := conn.Write(bytes.Repeat([]byte("x"), 3<<20)); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	advance(t, client(t, c.Nodes[1]), 61*time.Second)
	cl := client(t, c.Nodes[2])
	harness.Until(t, time.Minute, "nothing to be left of the upload", func() error {
		m, err := c.Leader().Metrics()
		if err != nil {
			return err
		}
		for line := range strings.Lines(m) {
			if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && strings.HasPrefix(name, "tercet_upload") && value != "0" {
				return fmt.Errorf("%s", line)
			}
		}
		return nil
	})
	if a := cl.Do(t.Context(), http.MethodGet, "/v1/topics/broken", nil, nil); a.Status == http.StatusOK && !bytes.Contains(a.Body, []byte(`"published":0`)) {
		t.Errorf("something was published: %v", a)
	}
	c.EqualHashes()
}
