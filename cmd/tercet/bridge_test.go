package main

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"tercet.dev/tercet/compat/gateway/bridge"
)

// Where progress goes to a file it is shown now and then, and at the end in any case: the last line is where it ended.
func TestBridgeProgressEnds(t *testing.T) {
	var shown bytes.Buffer
	v := (&app{out: io.Discard, err: &shown}).newBridgeView(&bridgeOptions{stream: "orders"})
	for n := int64(1); n <= 3; n++ {
		v.tell(bridge.Progress{Copied: n, Total: 3, Lag: 3 - n, Following: n == 3, Position: "5-0"})
	}
	v.end()
	v.end()
	lines := strings.Split(strings.TrimSpace(shown.String()), "\n")
	if n := len(lines); n < 2 || n > 3 || !strings.HasPrefix(lines[0], "copying [########................] 1 of 3 entries, 2 behind") ||
		!strings.HasPrefix(lines[n-1], "following [########################] 3 of 3 entries, 0 behind") {
		t.Errorf("shown:\n%s", shown.String())
	}
}
