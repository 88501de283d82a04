package peer

import (
	"encoding/binary"
	"fmt"
	"unicode/utf8"
)

// Protocol versions this package speaks. A release that changes a frame's meaning raises VersionNewest and keeps
// VersionOldest at what the release before it speaks, so that nodes of both work together during an upgrade.
const (
	VersionNewest uint16 = 1
	VersionOldest uint16 = 1
)

// helloMagic begins every handshake; what does not start with it is no node of ours.
const helloMagic uint32 = 0x74637274 // "trct"

// nameMax bounds each text of a handshake.
const nameMax = 512

// Hello is what one end of a connection says about itself and about what it wants. The answer has the same form.
type Hello struct {
	// Newest and Oldest bound the protocol versions the speaker knows. In an answer both are the chosen one.
	Newest, Oldest uint16
	// Purpose is what the connection is for.
	Purpose Purpose
	// Cluster is the speaker's cluster, empty before formation.
	Cluster string
	// ID and Zone are the speaker's.
	ID   ID
	Zone string
	// Target is who the speaker believes to talk to; empty only in an introduction.
	Target ID
}

func (h *Hello) encode() []byte {
	b := make([]byte, 0, 64)
	b = binary.LittleEndian.AppendUint32(b, helloMagic)
	b = binary.LittleEndian.AppendUint16(b, h.Newest)
	b = binary.LittleEndian.AppendUint16(b, h.Oldest)
	b = append(b, byte(h.Purpose))
	for _, s := range []string{h.Cluster, string(h.ID), h.Zone, string(h.Target)} {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
		b = append(b, s...)
	}
	return b
}

func decodeHello(b []byte) (Hello, error) {
	var h Hello
	if len(b) < 9 || binary.LittleEndian.Uint32(b) != helloMagic {
		return h, &FrameError{Reason: "no handshake"}
	}
	h.Newest = binary.LittleEndian.Uint16(b[4:])
	h.Oldest = binary.LittleEndian.Uint16(b[6:])
	h.Purpose = Purpose(b[8])
	b = b[9:]
	var texts [4]string
	for i := range texts {
		if len(b) < 2 {
			return h, &FrameError{Reason: "handshake cut short"}
		}
		n := int(binary.LittleEndian.Uint16(b))
		b = b[2:]
		if n > nameMax || n > len(b) {
			return h, &FrameError{Reason: "handshake text too long"}
		}
		texts[i] = string(b[:n])
		b = b[n:]
		if !printable(texts[i]) {
			return h, &FrameError{Reason: "handshake text is not printable"}
		}
	}
	// What follows the four texts belongs to a newer version, which the version check judges.
	h.Cluster, h.ID, h.Zone, h.Target = texts[0], ID(texts[1]), texts[2], ID(texts[3])
	if h.ID == "" {
		return h, &FrameError{Reason: "handshake without identity"}
	}
	return h, nil
}

// printable tells whether s may appear in a log line as it is.
func printable(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if r < ' ' || r == 0x7f {
			return false
		}
	}
	return true
}

// negotiate returns the newest version both ranges contain.
func negotiate(newest, oldest uint16) (uint16, *RefusedError) {
	v := min(newest, VersionNewest)
	if v < VersionOldest || v < oldest || newest < oldest {
		return 0, &RefusedError{Code: RefusedVersion, Reason: fmt.Sprintf(
			"this node speaks protocol versions %d to %d, the other %d to %d: upgrade in steps of one release",
			VersionOldest, VersionNewest, oldest, newest)}
	}
	return v, nil
}

// judge decides whether a connection from (or, in its answer, to) the speaker of h may exist. Target has been
// checked by the caller; table maps the names of the nodes this one knows to their identities.
//
// Two nodes that both belong to a cluster must belong to the same. While one of them does not know its cluster
// yet, being in the other's table takes its place: that is how the first leader reaches followers that have not
// applied the entry which names the cluster. A name that the table knows with another incarnation is a node that
// lost its memory, and is refused whatever else it says.
func judge(h Hello, cluster string, table map[string][]ID) *RefusedError {
	known := false
	other := ID("")
	for _, id := range table[h.ID.Name()] {
		if id == h.ID {
			known = true
		} else {
			other = id
		}
	}
	if !known && other != "" {
		return &RefusedError{Code: RefusedIdentity, Reason: fmt.Sprintf(
			"node %s is a member as %s; %s has another data directory (wiped or copied?) and must replace it: tercet cluster replace",
			h.ID.Name(), other, h.ID)}
	}
	if cluster != "" && h.Cluster != "" && cluster != h.Cluster {
		return &RefusedError{Code: RefusedCluster, Reason: fmt.Sprintf(
			"this node belongs to cluster %s, %s to cluster %s", cluster, h.ID, h.Cluster)}
	}
	if !known && (cluster == "" || h.Cluster == "") {
		return &RefusedError{Code: RefusedIdentity, Reason: fmt.Sprintf(
			"node %s is not in the table, and without a common cluster that is needed", h.ID)}
	}
	return nil
}
