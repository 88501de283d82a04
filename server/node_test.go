package server

import (
	"testing"

	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/auth"
	"tercet.dev/tercet/server/servertest"
)

// newNode runs a cluster of one node until the test ends.
func newNode(t testing.TB) *raft.Node { return servertest.Nodes(t, 1)[0] }

// TestBadInput runs the table against a leader and against a follower.
func TestBadInput(t *testing.T) {
	nodes := servertest.Nodes(t, 3)
	done := map[raft.Role]bool{}
	for _, n := range nodes {
		role := n.Status().Role
		if done[role] {
			continue
		}
		done[role] = true
		t.Run(string(role), func(t *testing.T) {
			_, url := start(t, Options{Backend: n})
			servertest.BadInput(t, servertest.Target{URL: url})
			_, url = start(t, Options{Backend: n, Authorizer: authenticator(t, map[string]string{"good": "publish"}, auth.Limits{})})
			badTokens(t, url)
		})
	}
	if !done[raft.Leader] || !done[raft.Follower] {
		t.Errorf("the table ran against %v", done)
	}
}
