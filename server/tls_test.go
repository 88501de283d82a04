package server

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// TestTLS: the protocol behind TLS, its refusals of ambiguous heads included, and what plain HTTP is told there.
func TestTLS(t *testing.T) {
	// The certificate of the standard library's test server, for 127.0.0.1.
	donor := httptest.NewUnstartedServer(nil)
	donor.StartTLS()
	certificate, client := donor.TLS.Certificates[0], donor.Client()
	donor.Close()
	_, base := start(t, Options{Backend: &fakeBackend{}, TLS: &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"http/1.1"}}})
	host := strings.TrimPrefix(base, "http://")
	defer client.CloseIdleConnections()
	for range 3 {
		res, err := client.Post("https://"+host+"/api/v3/topic/t", "text/plain", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusCreated || res.ProtoMajor != 1 {
			t.Errorf("answered %s over %s", res.Status, res.Proto)
		}
	}
	conn, err := tls.Dial("tcp", host, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	fmt.Fprintf(conn, "POST /api/v3/topic/t HTTP/1.1\r\nHost: %s\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", host)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || res.StatusCode != 400 {
		t.Errorf("an ambiguous head behind TLS: %v, %v", res, err)
	}
	for _, method := range []string{"GET", "POST", "DELETE", "PATCH", "PUT", "HEAD"} {
		plain, err := net.Dial("tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		plain.SetDeadline(time.Now().Add(time.Minute))
		fmt.Fprintf(plain, "%s /livez HTTP/1.1\r\nHost: %s\r\n\r\n", method, host)
		got, err := io.ReadAll(plain)
		if err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 400 ") || !strings.Contains(string(got), "https://") {
			t.Errorf("plain %s is told %q, %v", method, got, err)
		}
		plain.Close()
	}
}
