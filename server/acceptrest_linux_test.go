package server

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/http"
	"testing"
)

// TestShutdownServesTheQueue fills a listener's queue before anybody accepts, and stops the server: who was let in is
// answered, who comes later is refused.
func TestShutdownServesTheQueue(t *testing.T) {
	s, err := New(Options{Backend: &fakeBackend{}})
	if err != nil {
		t.Fatal(err)
	}
	var config net.ListenConfig
	inner, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const clients = 20
	var conns []net.Conn
	for range clients {
		conn, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST /api/v3/topic/t HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx")
		conns = append(conns, conn)
	}
	l, err := s.listen(inner)
	if err != nil {
		t.Fatal(err)
	}
	if !l.refuse() {
		t.Fatal("the listener cannot be ended in this way")
	}
	if conn, err := net.Dial("tcp", inner.Addr().String()); err == nil {
		conn.Close()
		t.Error("a connection is let in after the refusal began")
	}
	served, stopped := make(chan error, 1), make(chan error, 1)
	go func() { stopped <- s.Shutdown(t.Context()) }()
	go func() { served <- s.http.Serve(l) }()
	for i, conn := range conns {
		if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode != 201 {
			t.Errorf("client %d of the queue: %v, %v", i, res, err)
		}
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("Serve returns %v", err)
	}
}
