package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"sync"
	"time"
)

// Endpoint is a listener inside a server process that runs workloads against the process's own node and hands out
// profiles. It is opened by a hidden flag, on a loopback address only, and asks nobody who they are.
type Endpoint struct {
	node   Node
	l      net.Listener
	server http.Server
	served sync.WaitGroup
}

// Listen opens an endpoint. addr must be a loopback address.
func Listen(addr string, node Node) (*Endpoint, error) {
	tcp, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return nil, err
	}
	if !tcp.IP.IsLoopback() {
		return nil, fmt.Errorf("%s is no loopback address", addr)
	}
	l, err := net.ListenTCP("tcp", tcp)
	if err != nil {
		return nil, err
	}
	e := &Endpoint{node: node, l: l}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /load", e.load)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	// Blocking is recorded only while somebody looks.
	mux.HandleFunc("POST /debug/contention", func(_ http.ResponseWriter, r *http.Request) {
		on := r.URL.Query().Get("on") == "true"
		rate, fraction := 0, 0
		if on {
			rate, fraction = 10_000, 10
		}
		runtime.SetBlockProfileRate(rate)
		runtime.SetMutexProfileFraction(fraction)
	})
	e.server = http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	e.served.Add(1)
	go func() {
		defer e.served.Done()
		_ = e.server.Serve(l) // returns when Close is called
	}()
	return e, nil
}

// Addr is the address the endpoint listens on.
func (e *Endpoint) Addr() string { return e.l.Addr().String() }

// Close ends the endpoint and the workloads it runs.
func (e *Endpoint) Close() error {
	err := e.server.Close()
	e.served.Wait()
	return err
}

// event is one line of the answer to POST /load.
type event struct {
	// Phase is "begin" when the part that counts begins, "progress", "end" when it has ended, or "result".
	Phase        string  `json:"phase"`
	Published    int64   `json:"published,omitempty"`
	Acknowledged int64   `json:"acknowledged,omitempty"`
	Result       *Result `json:"result,omitempty"`
	Error        string  `json:"error,omitempty"`
}

// load runs the workload of the request's body and answers with a line of JSON per event, each as it happens.
func (e *Endpoint) load(w http.ResponseWriter, r *http.Request) {
	var workload Workload
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16)).Decode(&workload); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err := workload.Validate(); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var mu sync.Mutex
	enc, flush := json.NewEncoder(w), http.NewResponseController(w).Flush
	say := func(ev event) {
		mu.Lock()
		defer mu.Unlock()
		_ = enc.Encode(ev) // if nobody listens any more the request's context ends the run
		_ = flush()
	}
	driver := &NodeDriver{Node: e.node, Workload: workload}
	driver.Prepare()
	result, err := Run(r.Context(), workload, driver, Hooks{
		Begin:    func() { say(event{Phase: "begin"}) },
		End:      func() { say(event{Phase: "end"}) },
		Progress: func(p, a int64) { say(event{Phase: "progress", Published: p, Acknowledged: a}) },
	})
	last := event{Phase: "result", Result: result}
	if err != nil {
		last.Error = err.Error()
	}
	say(last)
}

// RunRemote has the endpoint at addr run a workload. The hook Published is not called.
func RunRemote(ctx context.Context, addr string, w Workload, hooks Hooks) (*Result, error) {
	body, err := json.Marshal(w)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+"/load", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // as much of the reason as there is
		return nil, fmt.Errorf("the leader's endpoint answers %s: %s", resp.Status, bytes.TrimSpace(text))
	}
	call := func(f func()) {
		if f != nil {
			f()
		}
	}
	dec := json.NewDecoder(resp.Body)
	for {
		var ev event
		if err := dec.Decode(&ev); err != nil {
			return nil, fmt.Errorf("the leader ended the run: %w", err)
		}
		switch ev.Phase {
		case "begin":
			call(hooks.Begin)
		case "end":
			call(hooks.End)
		case "progress":
			if hooks.Progress != nil {
				hooks.Progress(ev.Published, ev.Acknowledged)
			}
		case "result":
			if ev.Error != "" {
				return ev.Result, errors.New(ev.Error)
			}
			return ev.Result, nil
		}
	}
}
