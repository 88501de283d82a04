package raft

import (
	"context"
	"sync"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft/peer"
)

// kindBroadcast carries a message of a front end to those of the other nodes. Nothing of it is kept.
const kindBroadcast = peer.KindUser + 49

// kindAsk carries a question of a front end to the one on the leader, and its answer back: the length of the subject in
// one byte, the subject, the question.
const kindAsk = peer.KindUser + 50

// OnBroadcast sets what answers the messages that other nodes broadcast. It must not block for long.
func (n *Node) OnBroadcast(answer func(payload []byte) []byte) { n.broadcast.Store(&answer) }

// Broadcast hands payload to the other nodes that are connected, and returns their answers. It promises nothing: a node that
// is away, or does not answer until ctx ends, is left out. Two broadcasts arrive in their order if the second begins after
// the first has returned.
func (n *Node) Broadcast(ctx context.Context, payload []byte) [][]byte {
	var (
		mu      sync.Mutex
		wg      sync.WaitGroup
		answers [][]byte
	)
	for id := range n.mesh.Peers() {
		if id == peerID(n.id) || !n.mesh.Connected(id) {
			continue
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			answer, err := n.mesh.Call(ctx, id, kindBroadcast, payload)
			if err != nil {
				n.log.Debug("a broadcast did not arrive", "to", engine.NodeID(id), "error", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			answers = append(answers, answer)
		}()
	}
	wg.Wait()
	return answers
}

// serveBroadcast answers another node's broadcast.
func (n *Node) serveBroadcast(payload []byte) ([]byte, error) {
	answer := n.broadcast.Load()
	if answer == nil {
		return nil, nil
	}
	return (*answer)(payload), nil
}

// OnAsk sets what answers the questions about a subject that other nodes ask the leader. It must not block for long.
func (n *Node) OnAsk(subject string, answer func(question []byte) ([]byte, error)) {
	n.asked.Store(subject, answer)
}

// AskLeader puts a question to the node that leads, as far as this one knows; to itself if that is the case. It promises
// nothing: what the leader knows and does not keep may be gone with the next election.
func (n *Node) AskLeader(ctx context.Context, subject string, question []byte) ([]byte, error) {
	switch leader := n.leaderNow(); leader {
	case "":
		return nil, errs.Of(errs.NoLeader)
	case n.id:
		return n.answer(subject, question)
	default:
		conn, err := n.toLeader(leader)
		if err != nil {
			return nil, errs.Of(errs.NoLeader).With(err)
		}
		return conn.Call(ctx, kindAsk, 0, []byte{byte(len(subject))}, []byte(subject), question)
	}
}

// serveAsk answers another node's question.
func (n *Node) serveAsk(body []byte) ([]byte, error) {
	if len(body) == 0 || len(body) < 1+int(body[0]) {
		return nil, errMalformed
	}
	subject, question := body[1:1+int(body[0])], body[1+int(body[0]):]
	return n.answer(string(subject), question)
}

func (n *Node) answer(subject string, question []byte) ([]byte, error) {
	answer, ok := n.asked.Load(subject)
	if !ok {
		return nil, errs.New(errs.NotFound, "nobody here answers questions about %q", subject)
	}
	return answer.(func([]byte) ([]byte, error))(question)
}
