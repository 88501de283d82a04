package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf8"
)

// Conditions that callers branch on.
var (
	// ErrClosed says that the mesh has been closed.
	ErrClosed = errors.New("peer: closed")
	// ErrUnknownPeer says that the node is not in the table.
	ErrUnknownPeer = errors.New("peer: node is not in the table")
	// ErrRemoved says that the node was taken from the table while something waited for it.
	ErrRemoved = errors.New("peer: node was removed from the table")
)

// RefusedCode says why a connection was refused.
type RefusedCode uint8

// The reasons. They travel on the wire, so their numbers are fixed.
const (
	// RefusedVersion: no protocol version that both ends speak.
	RefusedVersion RefusedCode = 1
	// RefusedCluster: the two belong to different clusters.
	RefusedCluster RefusedCode = 2
	// RefusedTarget: the node that answered is not the one that was dialled.
	RefusedTarget RefusedCode = 3
	// RefusedIdentity: the dialling node is not who it may be: its name is known with another incarnation (a
	// wiped node under its old name), or it shares no cluster with this one and is not in its table.
	RefusedIdentity RefusedCode = 4
	// RefusedPurpose: the purpose is unknown here or not served.
	RefusedPurpose RefusedCode = 5
	// RefusedBusy: the node holds as many connections as it may.
	RefusedBusy RefusedCode = 6
	// RefusedPolicy: Options.Admit said no.
	RefusedPolicy RefusedCode = 7
	// RefusedProtocol: what arrived was no handshake.
	RefusedProtocol RefusedCode = 8
)

// String returns the reason's stable name.
func (c RefusedCode) String() string {
	switch c {
	case RefusedVersion:
		return "version"
	case RefusedCluster:
		return "cluster"
	case RefusedTarget:
		return "target"
	case RefusedIdentity:
		return "identity"
	case RefusedPurpose:
		return "purpose"
	case RefusedBusy:
		return "busy"
	case RefusedPolicy:
		return "policy"
	case RefusedProtocol:
		return "protocol"
	default:
		return fmt.Sprintf("code %d", uint8(c))
	}
}

// RefusedError says that one end of a connection did not want the other. Both ends have it: the one that
// refused logs it, the other gets it over the wire.
type RefusedError struct {
	// Code is what a program branches on.
	Code RefusedCode
	// Reason is what an operator reads: both sides' values, and what to do.
	Reason string
	// ByRemote tells whether the other end refused (true) or this one did.
	ByRemote bool
}

// Error implements error.
func (e *RefusedError) Error() string {
	who := "refused"
	if e.ByRemote {
		who = "refused by the other node"
	}
	return fmt.Sprintf("%s (%s): %s", who, e.Code, e.Reason)
}

// Code says why a node did not answer a request. It travels on the wire.
type Code uint8

// The codes of a RemoteError.
const (
	// CodeFailed: the handler returned an error; its text is in RemoteError.Text.
	CodeFailed Code = 1
	// CodeBusy: the node has more requests than it may; nothing was done.
	CodeBusy Code = 2
	// CodeUnbound: nobody serves the request's shard or kind there (yet); nothing was done.
	CodeUnbound Code = 3
)

// RemoteError is an answer that says why there is none.
type RemoteError struct {
	// Code is what a program branches on.
	Code Code
	// Text is for people.
	Text string
}

// Error implements error.
func (e *RemoteError) Error() string {
	switch e.Code {
	case CodeBusy:
		return "remote: busy: " + e.Text
	case CodeUnbound:
		return "remote: not served: " + e.Text
	default:
		return "remote: " + e.Text
	}
}

// remoteTextMax bounds the text of an error answer.
const remoteTextMax = 1 << 10

func encodeRemoteError(code Code, text string) []byte {
	if len(text) > remoteTextMax {
		text = text[:remoteTextMax]
	}
	b := make([]byte, 1, 1+len(text))
	b[0] = byte(code)
	return append(b, text...)
}

func decodeRemoteError(b []byte) *RemoteError {
	if len(b) == 0 {
		return &RemoteError{Code: CodeFailed, Text: "no reason given"}
	}
	text := b[1:]
	if len(text) > remoteTextMax {
		text = text[:remoteTextMax]
	}
	e := &RemoteError{Code: Code(b[0]), Text: string(text)}
	if !utf8.ValidString(e.Text) {
		e.Text = fmt.Sprintf("%q", e.Text)
	}
	return e
}

// ConnError says that a connection went away, or could not be had.
type ConnError struct {
	// Peer is the node at the other end.
	Peer ID
	// Sent tells whether the request may have reached the other node: if false, nothing has happened there.
	Sent bool
	// Cause is why.
	Cause error
}

// Error implements error.
func (e *ConnError) Error() string {
	if e.Sent {
		return fmt.Sprintf("connection to %s lost: %v", e.Peer, e.Cause)
	}
	return fmt.Sprintf("no connection to %s: %v", e.Peer, e.Cause)
}

// Unwrap returns the cause.
func (e *ConnError) Unwrap() error { return e.Cause }

func encodeRefusal(e *RefusedError) []byte {
	reason := e.Reason
	if len(reason) > remoteTextMax {
		reason = reason[:remoteTextMax]
	}
	b := binary.LittleEndian.AppendUint16(nil, uint16(e.Code))
	return append(b, reason...)
}

func decodeRefusal(b []byte) (*RefusedError, bool) {
	if len(b) < 2 || len(b) > 2+remoteTextMax {
		return nil, false
	}
	code := binary.LittleEndian.Uint16(b)
	if code == 0 || code > 0xff {
		return nil, false
	}
	reason := string(b[2:])
	// The text comes from outside and goes to a log: control characters must not forge lines there.
	for _, r := range reason {
		if r < ' ' || r == utf8.RuneError {
			reason = fmt.Sprintf("%q", reason)
			break
		}
	}
	return &RefusedError{Code: RefusedCode(code), Reason: reason, ByRemote: true}, true
}
