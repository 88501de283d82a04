package transport

import (
	"fmt"
	"testing"

	hraft "github.com/hashicorp/raft"
)

// BenchmarkPipeline sends appends over loopback to a follower that accepts at once, on disks that need no time: what
// frames, connections and goroutines cost. Bytes are of payload.
func BenchmarkPipeline(b *testing.B) {
	for _, size := range []int{100, 16 << 10, 256 << 10} {
		b.Run(fmt.Sprintf("entry=%d", size), func(b *testing.B) {
			ms := members(b, 2)
			leader, follower := ms[0], ms[1]
			leader.disk.sync(1 << 60)
			follower.disk.sync(1 << 60)
			stop := make(chan struct{})
			played := make(chan struct{})
			go func() {
				defer close(played)
				for {
					select {
					case rpc := <-follower.Consumer():
						rpc.Respond(&hraft.AppendEntriesResponse{Term: 5, Success: true}, nil)
					case <-stop:
						return
					}
				}
			}()
			p, err := leader.AppendEntriesPipeline(follower.id, follower.LocalAddr())
			if err != nil {
				b.Fatal(err)
			}
			data := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			b.ResetTimer()
			sent := make(chan error, 1)
			go func() {
				for i := range uint64(b.N) {
					a := leader.request(5, i, i)
					a.Entries = []*hraft.Log{{Index: i + 1, Term: 5, Data: data}}
					if _, err := p.AppendEntries(a, new(hraft.AppendEntriesResponse)); err != nil {
						sent <- err
						return
					}
				}
				sent <- nil
			}()
			for range b.N {
				<-p.Consumer()
			}
			if err := <-sent; err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			close(stop)
			<-played
			_ = p.Close()
		})
	}
}

// BenchmarkRoundTrip is one append at a time: the latency that the transport adds to a commit.
func BenchmarkRoundTrip(b *testing.B) {
	ms := members(b, 2)
	leader, follower := ms[0], ms[1]
	leader.disk.sync(1 << 60)
	follower.disk.sync(1 << 60)
	stop := make(chan struct{})
	played := make(chan struct{})
	go func() {
		defer close(played)
		for {
			select {
			case rpc := <-follower.Consumer():
				rpc.Respond(&hraft.AppendEntriesResponse{Term: 5, Success: true}, nil)
			case <-stop:
				return
			}
		}
	}()
	p, err := leader.AppendEntriesPipeline(follower.id, follower.LocalAddr())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for i := range uint64(b.N) {
		if _, err := p.AppendEntries(leader.request(5, i, i+1), new(hraft.AppendEntriesResponse)); err != nil {
			b.Fatal(err)
		}
		<-p.Consumer()
	}
	b.StopTimer()
	close(stop)
	<-played
	_ = p.Close()
}
