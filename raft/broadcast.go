package raft

import (
	"context"
	"sync"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft/peer"
)

// kindBroadcast carries a message of a front end to those of the other nodes. Nothing of it is kept.
const kindBroadcast = peer.KindUser + 49

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
