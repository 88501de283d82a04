package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

// forming answers on a node's HTTP listeners until the node has started, which takes as long as its founding does: the
// process lives and is not ready, and whatever is asked of it has to be asked again later.
type forming struct {
	listeners []net.Listener
	http      *http.Server
	conns     chan net.Conn
	done      chan struct{}
	wg        sync.WaitGroup
}

// formingPatience bounds the last answers of forming.
const formingPatience = time.Second

// serveForming begins to answer on the listeners, by TLS if secure is not nil. stop ends it and leaves the listeners
// open, with nobody turned away.
func serveForming(listeners []net.Listener, secure *tls.Config, log hclog.Logger) (stop func()) {
	f := &forming{listeners: listeners, conns: make(chan net.Conn), done: make(chan struct{})}
	f.http = &http.Server{Handler: f, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second}
	f.http.ErrorLog = log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug})
	f.http.SetKeepAlivesEnabled(false)
	for _, l := range listeners {
		f.wg.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return // the deadline that stop sets
				}
				f.conns <- conn
			}
		})
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		var l net.Listener = f
		if secure != nil {
			l = tls.NewListener(f, secure)
		}
		_ = f.http.Serve(l) // ends with stop
	}()
	return sync.OnceFunc(func() {
		f.deadline(time.Unix(1, 0))
		f.wg.Wait()
		f.deadline(time.Time{})
		ctx, cancel := context.WithTimeout(context.Background(), formingPatience)
		defer cancel()
		if err := f.http.Shutdown(ctx); err != nil {
			_ = f.http.Close()
		}
		<-served
	})
}

func (f *forming) deadline(t time.Time) {
	for _, l := range f.listeners {
		if d, ok := l.(interface{ SetDeadline(t time.Time) error }); ok {
			_ = d.SetDeadline(t) // a listener that is closed needs none
		}
	}
}

// Accept implements net.Listener.
func (f *forming) Accept() (net.Conn, error) {
	select {
	case conn := <-f.conns:
		return conn, nil
	case <-f.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener; http.Server calls it once.
func (f *forming) Close() error {
	close(f.done)
	return nil
}

// Addr implements net.Listener.
func (f *forming) Addr() net.Addr { return f.listeners[0].Addr() }

// ServeHTTP implements http.Handler.
func (f *forming) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	e := errs.New(errs.NoLeader, "this node is starting, or waits for the other founding nodes")
	switch r.URL.Path {
	case "/livez":
		h.Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write([]byte("ok\n"))
	case "/readyz", "/healthz":
		h.Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = w.Write([]byte(e.Text() + "\n"))
	default:
		// 429 is understood by every operation: nothing happened, come again.
		h.Set("Content-Type", wire.MediaJSON)
		h.Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
		info := e.Code.Info()
		_ = json.NewEncoder(w).Encode(wire.Error{Error: e.Text(), Code: info.Name, Outcome: "none", Hint: info.Hint})
	}
}
