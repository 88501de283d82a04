package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/servertest"
	"tercet.dev/tercet/server/wire"
)

// multipartBatch makes a batch of bodies, the headers of each from head.
func multipartBatch(bodies [][]byte, head func(i int) string) []byte {
	var b bytes.Buffer
	for i, body := range bodies {
		fmt.Fprintf(&b, "--vqs-1\r\n%s\r\n", head(i))
		b.Write(body)
		b.WriteString("\r\n")
	}
	b.WriteString("--vqs-1--\r\n")
	return b.Bytes()
}

func frameBatch(bodies [][]byte, head func(i int) string) []byte {
	var b []byte
	for i, body := range bodies {
		b = wire.AppendFrame(b, []byte(strings.ReplaceAll(head(i), "\r\n", "\n")), body)
	}
	return b
}

// sendBatchOf sends a batch, chunked when its length is not to be known before.
func sendBatchOf(t *testing.T, base, topic, contentType string, body []byte, chunked bool) (int, []wire.BatchResult, http.Header) {
	t.Helper()
	var reader io.Reader = bytes.NewReader(body)
	if chunked {
		reader = io.MultiReader(reader) // hides the length
	}
	req, err := http.NewRequest("POST", base+"/api/v3/topic/"+topic+"/batch", reader)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var out wire.Batch
	if res.StatusCode == 200 {
		if err := json.NewDecoder(res.Body).Decode(&out); err != nil {
			t.Fatal(err)
		}
	}
	return res.StatusCode, out.Results, res.Header
}

// TestLargeBatches: batches that do not fit one entry, in both framings, with messages of all sizes.
func TestLargeBatches(t *testing.T) {
	nodes := servertest.Nodes(t, 3)
	dir := t.TempDir()
	_, base := start(t, Options{Backend: nodes[0], VirtualClock: true, Spool: dir})
	_, other := start(t, Options{Backend: nodes[1]})
	m := manager{t, base}
	sizes := map[string][]int64{
		"in a file":   {10, 2<<20 + 1, 0, 900_000, 900_000, 900_000, limits.MessageBytesMax, limits.MessageBytesMax + 1, 7},
		"in memory":   {10, 2 << 20, 20},
		"of one size": {700_000, 700_000, 700_000, 700_000, 700_000},
	}
	for name, sizes := range sizes {
		var bodies [][]byte
		for i, n := range sizes {
			bodies = append(bodies, patternBytes(byte(i), n))
		}
		bad := len(bodies)
		bodies = append(bodies, []byte("bad"), []byte("last"))
		head := func(i int) string {
			if i == bad {
				return "vqs-retention-seconds: 1\r\n"
			}
			return fmt.Sprintf("content-type: text/x-%d\r\nx-number: %d\r\nvqs-idempotency-key: k%d\r\n", i, i, i)
		}
		for form, chunked := range map[string]bool{"multipart/mixed; boundary=vqs-1": true, wire.MediaBatch: false} {
			topic := strings.ReplaceAll(name, " ", "-") + fmt.Sprint("-", chunked)
			body := frameBatch(bodies, head)
			if chunked {
				body = multipartBatch(bodies, head)
			}
			// What ends early, or has more behind its end, stores nothing.
			for _, broken := range [][]byte{body[:len(body)-9], append(bytes.Clone(body), "\x7fmore"...)} {
				if status, _, _ := sendBatchOf(t, base, topic, form, broken, chunked); status != 400 {
					t.Fatalf("%s, %s: a broken batch got %d", name, form, status)
				}
			}
			for round := range 2 { // the second time all are duplicates
				status, results, header := sendBatchOf(t, base, topic, form, body, chunked)
				if status != 200 || len(results) != len(bodies) || round == 0 && header.Get(wire.HeaderZones) != "3" {
					t.Fatalf("%s, %s: %d with %d results, %v", name, form, status, len(results), header)
				}
				ids := map[string]bool{}
				for i, r := range results {
					if i == bad {
						if r.Status != "failed" || r.StatusCode != 400 || r.Retryable {
							t.Errorf("%s: the bad message got %+v", name, r)
						}
						continue
					}
					if r.Status != "sent" || r.MessageID == "" || ids[r.MessageID] {
						t.Errorf("%s: message %d got %+v", name, i, r)
					}
					ids[r.MessageID] = true
				}
				if round > 0 {
					continue
				}
				var got []received
				for len(got) < len(bodies)-1 {
					some := receiveMessages(t, other, topic, "g", wire.MediaMultipart, wire.HeaderMaxMessages, "10")
					if len(some) == 0 {
						break
					}
					got = append(got, some...)
				}
				if len(got) != len(bodies)-1 {
					t.Fatalf("%s: %d messages came", name, len(got))
				}
				for k, g := range got {
					i := k
					if k >= bad {
						i++
					}
					if !bytes.Equal(g.body, bodies[i]) || g.head["x-number"] != fmt.Sprint(i) || g.head["content-type"] != fmt.Sprint("text/x-", i) || g.head["vqs-message-id"] != results[i].MessageID {
						t.Errorf("%s: message %d came as %d bytes, %v", name, i, len(g.body), g.head)
					}
				}
			}
			var s wire.Topic
			m.do(200, "GET", "/v1/topics/"+topic, "", &s)
			if int(s.Published) != len(bodies)-1 {
				t.Errorf("%s: %d messages were published", name, s.Published)
			}
		}
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) > 0 {
		t.Errorf("%v is left, %v", files, err)
	}
}

// failing is a node that cannot publish after a while.
type failing struct {
	*raft.Node
	left atomic.Int64
}

func (f *failing) Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
	if f.left.Add(-1) < 0 {
		return raft.Reply{}, errs.Of(errs.NoLeader)
	}
	return f.Node.Propose(ctx, p)
}

// TestLargeBatchFailsMidway: what was stored is told from what was not, and may be tried again.
func TestLargeBatchFailsMidway(t *testing.T) {
	var bodies [][]byte
	for i := range 6 {
		bodies = append(bodies, patternBytes(byte(i), 700_000))
	}
	body := frameBatch(bodies, func(int) string { return "" })
	node := &failing{Node: newNode(t)}
	_, base := start(t, Options{Backend: node})
	for _, steps := range []int64{0, 1, 4, 6} {
		node.left.Store(steps)
		status, results, _ := sendBatchOf(t, base, fmt.Sprint("t", steps), wire.MediaBatch, body, false)
		if steps == 0 {
			if status != 429 && status < 500 {
				t.Errorf("nothing was stored: %d", status)
			}
			continue
		}
		if status != 200 || len(results) != len(bodies) {
			t.Fatalf("%d steps: %d, %v", steps, status, results)
		}
		for i, r := range results {
			if want := int64(i) < steps; (r.Status == "sent") != want || r.Retryable == want {
				t.Errorf("%d steps: message %d is %+v", steps, i, r)
			}
		}
	}
}

// TestWithoutSpool: without a place for it, a large batch is refused, and so is a large message in a small one.
func TestWithoutSpool(t *testing.T) {
	s, base := start(t, Options{Backend: newNode(t)})
	s.spool, s.batchBodyMax = "", 0
	body := frameBatch([][]byte{patternBytes(1, limits.BatchBytesMax)}, func(int) string { return "" })
	for _, chunked := range []bool{false, true} {
		if status, _, _ := sendBatchOf(t, base, "t", wire.MediaBatch, body, chunked); status != 413 {
			t.Errorf("chunked %v: %d", chunked, status)
		}
	}
	body = frameBatch([][]byte{patternBytes(1, limits.MessageBytesMax+1), []byte("small")}, func(int) string { return "" })
	status, results, _ := sendBatchOf(t, base, "t", wire.MediaBatch, body, false)
	if status != 200 || len(results) != 2 || results[0].StatusCode != 413 || results[0].Retryable || results[1].Status != "sent" {
		t.Errorf("%d, %+v", status, results)
	}
	if got := receiveMessages(t, base, "t", "g", wire.MediaNDJSON, wire.HeaderMaxMessages, "10"); len(got) != 1 {
		t.Errorf("%d messages were stored", len(got))
	}
}
