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

// What a comparison found is never more than was compared.
func TestBridgeComparisonText(t *testing.T) {
	for want, m := range map[string]migrated{
		"nothing to compare: no entry was copied yet\n": {Position: "0-0", Checksum: "00", Equal: true},
		"equal: 3 entries up to 5-0, checksum 0a\n":     {Position: "5-0", Source: 3, Copy: 3, Checksum: "0a", Equal: true},
		"different: source 3, copy 2 entries up to 5-0; 1 missing, 0 foreign, 0 different; the first at 4-0\n": {
			Position: "5-0", Source: 3, Copy: 2, Missing: 1, First: "4-0"},
		"equal: 2 entries up to 5-0, checksum 0a; the copy has 1 more that the source has deleted since\n": {
			Position: "5-0", Source: 2, Copy: 3, Deleted: 1, Checksum: "0a", Equal: true},
	} {
		var got bytes.Buffer
		if err := m.text(&got); err != nil || got.String() != want {
			t.Errorf("printed %q, %v; want %q", got.String(), err, want)
		}
	}
}
