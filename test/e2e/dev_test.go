package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// devDocument is what `tercet dev -o json` prints.
type devDocument struct {
	Data, Leader string
	InSync       []string
	Nodes        []devNode
}

type devNode struct {
	ID, Zone, HTTP, Peer, Log string
	Pid                       int
}

// devArguments are those of a local cluster on free ports of its own.
func devArguments(t *testing.T, data string, more ...string) (args []string, httpPort int) {
	httpPort = harness.FreePorts(t, 3)
	return append([]string{"dev", "--data", data, "--http-port", strconv.Itoa(httpPort), "--peer-port", strconv.Itoa(harness.FreePorts(t, 3)),
		"--valkey-port", strconv.Itoa(harness.FreePorts(t, 3))}, more...), httpPort
}

// startDev starts `tercet dev`.
func startDev(t *testing.T, args []string) *harness.Process {
	return harness.StartProcess(t, filepath.Join(t.TempDir(), "dev.log"), "", nil, append([]string{harness.Binary(t)}, args...)...)
}

// document waits for what `tercet dev -o json` prints.
func document(t *testing.T, p *harness.Process) (doc devDocument) {
	t.Helper()
	harness.Until(t, 30*time.Second, "tercet dev to say that all zones are in sync", func() error {
		if !p.Alive() {
			t.Fatalf("tercet dev has ended:\n%s", p.Log())
		}
		for line := range strings.Lines(p.Log()) {
			if strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &doc) == nil {
				return nil
			}
		}
		return errNotYet
	})
	return doc
}

// children returns the ids of the processes that p started itself and that have not ended.
func children(t *testing.T, p *harness.Process) []int {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.PID))
	if err != nil || len(files) == 0 {
		t.Fatalf("the children of process %d: %v", p.PID, err)
	}
	var pids []int
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // a thread that has ended
		}
		for _, field := range strings.Fields(string(text)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// TestDev runs `tercet dev` as its user would: two clusters side by side, a taken port, a child that is killed, and
// Ctrl-C.
func TestDev(t *testing.T) {
	t.Parallel()
	args, httpPort := devArguments(t, filepath.Join(t.TempDir(), "first"), "-o", "json")
	first := startDev(t, args)
	doc := document(t, first)
	zones, pids := []string{}, []int{}
	for i, n := range doc.Nodes {
		zones = append(zones, n.Zone)
		pids = append(pids, n.Pid)
		if want := fmt.Sprintf("http://127.0.0.1:%d", httpPort+i); n.HTTP != want || n.ID != fmt.Sprintf("n%d", i+1) {
			t.Errorf("node %d is %+v, want n%d at %s", i, n, i+1, want)
		}
	}
	slices.Sort(pids)
	if !slices.Equal(zones, []string{"a", "b", "c"}) || !slices.Equal(doc.InSync, zones) {
		t.Errorf("zones %v, in sync %v, want a, b, c", zones, doc.InSync)
	}
	if got := children(t, first); !slices.Equal(got, pids) {
		t.Errorf("the children are %v, and the nodes' pids are %v", got, pids)
	}
	// Both families, where the machine has them.
	hosts := []string{"127.0.0.1"}
	if l, err := net.Listen("tcp6", "[::1]:0"); err == nil {
		l.Close()
		hosts = append(hosts, "[::1]")
	}
	var servers []string
	for i := range doc.Nodes {
		for _, host := range hosts {
			cl := harness.NewClient(fmt.Sprintf("http://%s:%d", host, httpPort+i))
			publish(t, cl, "dev", fmt.Appendf(nil, "via %s of node %d", host, i+1))
			cl.Close()
		}
		servers = append(servers, doc.Nodes[i].HTTP)
	}
	sent := len(doc.Nodes) * len(hosts)

	// A second cluster, in words instead of JSON. The commands it suggests work as they stand.
	secondArgs, _ := devArguments(t, filepath.Join(t.TempDir(), "second"))
	second := startDev(t, secondArgs)
	harness.Until(t, 30*time.Second, "the second cluster to say what to try", func() error {
		if !second.Alive() {
			t.Fatalf("the second tercet dev has ended:\n%s", second.Log())
		}
		if !strings.Contains(second.Log(), "Ctrl-C stops all three") {
			return errNotYet
		}
		return nil
	})
	tried := 0
	for line := range strings.Lines(second.Log()) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, harness.Binary(t)+" ") {
			cmd := exec.CommandContext(t.Context(), "sh", "-c", line)
			cmd.Env = harness.Environment()
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", line, err, out)
			} else if strings.Contains(line, " receive ") && !bytes.Contains(out, []byte(`{"id": 1}`)) {
				t.Errorf("%s prints %q, want the message that was sent", line, out)
			}
			tried++
		}
	}
	if tried != 2 || !strings.Contains(second.Log(), "kill -9 ") {
		t.Errorf("%d commands tried, want 2, and one that kills the leader:\n%s", tried, second.Log())
	}

	// A third on the first one's ports does not start, says which flag to use, and does the first one no harm.
	third := append(slices.Clone(args), "--data", filepath.Join(t.TempDir(), "third"))
	_, errs, code := tercet(t, 30*time.Second, third...)
	if code != 4 || !strings.Contains(errs, "--http-port") || !strings.Contains(errs, strconv.Itoa(httpPort)) {
		t.Errorf("on taken ports: exit %d, %q, want 4 and the flag with the port", code, errs)
	}
	third = append(third, "--http-port", strconv.Itoa(harness.FreePorts(t, 3)))
	_, errs, code = tercet(t, 30*time.Second, third...)
	if code != 4 || !strings.Contains(errs, "--peer-port") {
		t.Errorf("on taken peer ports: exit %d, %q, want 4 and the flag", code, errs)
	}

	// The leader is killed: the other two go on, and it comes back by itself as another process.
	leader := slices.IndexFunc(doc.Nodes, func(n devNode) bool { return n.ID == doc.Leader })
	victim := doc.Nodes[leader]
	if err := syscall.Kill(victim.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	other := harness.NewClient(doc.Nodes[(leader+1)%3].HTTP)
	defer other.Close()
	for i := range 10 {
		publish(t, other, "dev", fmt.Appendf(nil, "without the leader, %d", i))
		sent++
	}
	harness.Until(t, 30*time.Second, "the killed node to be back in sync", func() error {
		out, errs, code := tercet(t, 10*time.Second, "cluster", "status", "--server", victim.HTTP, "-o", "json", "--timeout", "0s")
		if code != 0 {
			return fmt.Errorf("exit %d: %s", code, errs)
		}
		var status struct{ InSync []string }
		if err := json.Unmarshal([]byte(out), &status); err != nil || len(status.InSync) != 3 {
			return fmt.Errorf("in sync: %v %w", status.InSync, err)
		}
		return nil
	})
	now := children(t, first)
	if len(now) != 3 || slices.Contains(now, victim.Pid) {
		t.Errorf("the children are %v, want three without %d", now, victim.Pid)
	}
	for _, note := range []string{"node " + victim.ID + " (zone " + victim.Zone + ") ended: signal: killed; starting it again in 2s", "node " + victim.ID + " started again"} {
		if !strings.Contains(first.Log(), note) {
			t.Errorf("the restart is not reported: want %q in\n%s", note, first.Log())
		}
	}
	if out, errs, code := tercet(t, time.Minute, "receive", "dev", "--group", "g", "--max", "0", "--ack", "--server", strings.Join(servers, ",")); code != 0 || strings.Count(out, "\n") != sent {
		t.Errorf("exit %d, %d messages, want %d: %s", code, strings.Count(out, "\n"), sent, errs)
	}

	// Ctrl-C drains and stops all, and leaves no process and no pid file. The data stays.
	for _, p := range []*harness.Process{first, second} {
		pids := children(t, p)
		if err := p.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		code, err := p.WaitExit(30 * time.Second)
		if err != nil || code != 0 {
			t.Fatalf("tercet dev after an interrupt: exit %d, %v, want 0\n%s", code, err, p.Log())
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
				t.Errorf("process %d is left: %v", pid, err)
			}
		}
	}
	for _, n := range doc.Nodes {
		log, err := os.ReadFile(n.Log)
		if err != nil || !bytes.Contains(log, []byte("tercet: stopped")) && n.ID != "n1" { // the last one has nobody to hand over to
			t.Errorf("%s's log does not end in a stop: %v", n.ID, err)
		}
		if left, err := filepath.Glob(filepath.Join(doc.Data, "*.pid")); err != nil || len(left) > 0 {
			t.Errorf("pid files are left: %v %v", left, err)
		}
	}
	again := startDev(t, args)
	document(t, again)
	if out, errs, code := tercet(t, time.Minute, "receive", "dev", "--group", "late", "--max", "0", "--ack", "--server", strings.Join(servers, ",")); code != 0 || strings.Count(out, "\n") != sent {
		t.Errorf("after a stop and a start: exit %d, %d messages, want %d: %s", code, strings.Count(out, "\n"), sent, errs)
	}
	if err := again.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code, err := again.WaitExit(30 * time.Second); err != nil || code != 0 {
		t.Errorf("the third stop: exit %d, %v", code, err)
	}
}
