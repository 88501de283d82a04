package peer

import (
	"strings"
)

// ID names one life of a node: "name.incarnation". The name is what an operator calls it; the incarnation is
// drawn at random when its data directory is born, so that a wiped node is a stranger and not an amnesiac.
type ID string

// Name returns the part an operator chose.
func (id ID) Name() string {
	if i := strings.LastIndexByte(string(id), '.'); i >= 0 {
		return string(id[:i])
	}
	return string(id)
}

// Incarnation returns the part that was drawn when the data directory was born.
func (id ID) Incarnation() string {
	if i := strings.LastIndexByte(string(id), '.'); i >= 0 {
		return string(id[i+1:])
	}
	return ""
}

// Remote is the other end of a connection, as the handshake established it.
type Remote struct {
	// ID is who it is.
	ID ID
	// Zone is where it says it stands.
	Zone string
	// Cluster is the cluster it belongs to, empty before formation.
	Cluster string
	// Address is the network address of its end of the connection.
	Address string
	// Version is the protocol version the connection speaks: the newest both ends know.
	Version uint16
}

// Purpose says what a connection carries.
type Purpose uint8

// The purposes. They travel in the handshake, so their numbers are fixed.
const (
	Control      Purpose = 1
	Data         Purpose = 2
	Snapshot     Purpose = 3
	Forward      Purpose = 4
	Introduction Purpose = 5
)

// String returns the purpose's name as logs and metrics show it.
func (p Purpose) String() string {
	switch p {
	case Control:
		return "control"
	case Data:
		return "data"
	case Snapshot:
		return "snapshot"
	case Forward:
		return "forward"
	case Introduction:
		return "introduction"
	default:
		return "unknown"
	}
}

func (p Purpose) valid() bool { return p >= Control && p <= Introduction }
