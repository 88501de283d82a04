package e2e

import (
	"bufio"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// TestExitCodes ends commands in each of the ways that scripts branch on, against a real cluster where the code
// depends on one, and looks for what each failure says to do about it.
func TestExitCodes(t *testing.T) {
	t.Parallel()
	c := harness.Start(t, harness.Options{})
	followers, leader := c.Followers()
	server := "--server=" + leader.URL() + "," + followers[1].URL()
	nobody := "--server=http://127.0.0.1:" + strconv.Itoa(harness.FreePorts(t, 1))
	p := publish(t, client(t, leader), "codes", []byte("x"))
	ds, a := client(t, leader).Receive(t.Context(), harness.Receive{Topic: "codes", Group: "g", Visibility: time.Minute})
	if len(ds) != 1 || ds[0].ID != p.ID {
		t.Fatalf("received %v: %v", ds, a)
	}
	receipt := ds[0].Receipt

	type step struct {
		code int
		says string // on stderr
		args []string
	}
	run := func(steps []step) {
		t.Helper()
		for _, s := range steps {
			out, errs, code := tercet(t, time.Minute, s.args...)
			if code != s.code || !strings.Contains(errs, s.says) {
				t.Errorf("tercet %s: exit %d, want %d and %q\n%s%s", strings.Join(s.args, " "), code, s.code, s.says, out, errs)
			}
		}
	}
	run([]step{
		{0, "", []string{"version"}},
		{0, "no messages", []string{"receive", "codes-empty", server}},
		{0, "", []string{"extend", "codes", "--group", "g", "--lease", "2m", receipt, server}},
		{0, "", []string{"ack", "codes", "--group", "g", receipt, server}},
		// 1: something that was tried failed.
		{1, "released", []string{"receive", "codes", "--group", "h", "--exec", "exit 7", server}},
		// 2: the command line, and what a server calls malformed.
		{2, "--help", []string{"sned", "codes", "x"}},
		{2, "--nonsense", []string{"send", "codes", "x", "--nonsense"}},
		{2, "name", []string{"send", "no such topic", "x", server}},
		{2, "receipt", []string{"ack", "codes", "nonsense", server}},
		{2, "--node-id", []string{"server", "--data", t.TempDir()}},
		// 3: what is named does not exist.
		{3, "", []string{"ack", "codes", "--group", "g", receipt, server}},
		{3, "n9", []string{"cluster", "remove", "n9", server}},
		{3, "no such directory", []string{"wal", "verify", "--data", "/nonexistent"}},
		// 4: not in this state.
		{4, "in use", []string{"cluster", "recover", "--data", leader.Data}},
		{4, "--http", []string{"server", "--node-id", "n9", "--data", t.TempDir(), "--http", leader.HTTP, "--peer", followers[0].Valkey}},
		// 5: nobody to talk to.
		{5, nobody[len("--server=http://"):], []string{"send", "codes", "x", nobody, "--timeout", "0s"}},
		{5, "", []string{"cluster", "status", nobody, "--timeout", "0s"}},
	})

	// 4 and 5: a node and a zone away.
	followers[0].Kill()
	c.WaitInSync(zonesWithout(c, followers[0])...)
	run([]step{
		{4, "--force", []string{"cluster", "recover", "--data", followers[0].Data}},
		{5, "zone", []string{"send", "codes", "x", "--durability", "all", "--timeout", "0s", server}},
	})

	// 6: the connection ends under the request.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cut := make(chan struct{})
	go func() {
		defer close(cut)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = http.ReadRequest(bufio.NewReader(conn))
			conn.Close()
		}
	}()
	run([]step{{6, "not known", []string{"ack", "codes", "--group", "g", receipt, "--server", "http://" + l.Addr().String(), "--timeout", "0s"}}})
	l.Close()
	<-cut
}
