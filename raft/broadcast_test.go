package raft

import (
	"slices"
	"testing"
)

// A broadcast reaches every other node that is there, none twice, and not its sender; one that is away is left out at once.
func TestBroadcast(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	for _, name := range founders {
		c.node(name).OnBroadcast(func(payload []byte) []byte { return append([]byte(name+" heard "), payload...) })
	}
	ask := func(from string) []string {
		var got []string
		for _, b := range c.node(from).Broadcast(testContext(t), []byte("hello")) {
			got = append(got, string(b))
		}
		slices.Sort(got)
		return got
	}
	for from, want := range map[string][]string{
		"n1": {"n2 heard hello", "n3 heard hello"}, "n2": {"n1 heard hello", "n3 heard hello"}, "n3": {"n1 heard hello", "n2 heard hello"},
	} {
		if got := ask(from); !slices.Equal(got, want) {
			t.Errorf("%s hears %q, want %q", from, got, want)
		}
	}
	c.stop("n3")
	c.eventually("n3 is left out", func() bool { return slices.Equal(ask("n1"), []string{"n2 heard hello"}) })
}

// A question reaches the front end on the leader from every node, the leader itself included, and nobody else.
func TestAskLeader(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	for _, name := range founders {
		c.node(name).OnAsk("names", func(question []byte) ([]byte, error) { return append([]byte(name+" heard "), question...), nil })
	}
	for _, name := range founders {
		c.eventually(name+" hears the leader", func() bool {
			got, err := c.node(name).AskLeader(testContext(t), "names", []byte("hello"))
			return err == nil && string(got) == c.node(name).Status().Leader+" heard hello"
		})
		if got, err := c.node(name).AskLeader(testContext(t), "nothing", nil); err == nil {
			t.Errorf("%s is answered %q to a question that nobody answers", name, got)
		}
	}
}
