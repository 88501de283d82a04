package engine

import (
	"fmt"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// publishEntry is an entry of n messages of size bytes each in one publish command per message, as the
// coalescer makes it from single publishes.
func publishEntry(now Stamp, n, size, perCommand int) []byte {
	var eb EntryBuilder
	eb.Reset(1, now, n*(size+64))
	body := make([]byte, size)
	for i := range body {
		body[i] = byte(i * 7)
	}
	for i := 0; i < n; i += perCommand {
		p := &Publish{Topic: "bench"}
		for range perCommand {
			p.Messages = append(p.Messages, NewMessage{ContentType: "application/json", Retention: 24 * time.Hour, Body: body})
		}
		eb.Add(0, uint64(i), 0, p.AppendTo(nil))
	}
	return eb.Bytes()
}

func benchEngine(b *testing.B) *testLog {
	return openTest(b, Options{FS: vfs.Default, Dir: b.TempDir()})
}

func BenchmarkApplyPublish(b *testing.B) {
	for _, c := range []struct{ n, size, per int }{{240, 1024, 1}, {200, 1024, 100}, {2000, 100, 1}, {1, 1024, 1}} {
		b.Run(fmt.Sprintf("%dx%d/%d", c.n, c.size, c.per), func(b *testing.B) {
			l := benchEngine(b)
			index := uint64(0)
			entry := publishEntry(l.now, c.n, c.size, c.per)
			b.SetBytes(int64(len(entry)))
			b.ReportAllocs()
			var res []Result
			var err error
			for b.Loop() {
				index++
				if res, err = l.e.Apply(index, 1, entry, res[:0], &l.fx); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*c.n), "ns/msg")
			b.StopTimer()
			if err := l.e.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkReceiveAck measures one receive of one message and its acknowledgement, a hundred of each an entry.
func BenchmarkReceiveAck(b *testing.B) {
	for _, max := range []int{1, 10} {
		b.Run(fmt.Sprint(max), func(b *testing.B) {
			l := benchEngine(b)
			index := uint64(0)
			fill := func() {
				entry := publishEntry(l.now, 2000, 100, 1)
				for range 5 {
					index++
					if _, err := l.e.Apply(index, 1, entry, nil, &l.fx); err != nil {
						b.Fatal(err)
					}
				}
			}
			cmd := (&Receive{Topic: "bench", Group: "g", Max: max, Visibility: time.Minute}).AppendTo(nil)
			left, received := 0, 0
			var acks []Receipt
			var res []Result
			b.ReportAllocs()
			for b.Loop() {
				if left < 100*max {
					b.StopTimer()
					fill()
					left += 10000
					b.StartTimer()
				}
				var eb EntryBuilder
				eb.Reset(1, l.now, 100*len(cmd))
				for range 100 {
					eb.Add(0, 0, 0, cmd)
				}
				index++
				var err error
				if res, err = l.e.Apply(index, 1, eb.Bytes(), res[:0], &l.fx); err != nil {
					b.Fatal(err)
				}
				left -= 100 * max
				eb.Reset(1, l.now, 100*len(cmd))
				for i := range res {
					acks = acks[:0]
					for _, d := range res[i].Deliveries {
						acks = append(acks, d.Receipt)
					}
					eb.Add(0, 0, 0, (&Settle{Topic: "bench", Group: "g", Op: Acknowledge, Receipts: acks}).AppendTo(nil))
					received += len(acks)
				}
				index++
				if res, err = l.e.Apply(index, 1, eb.Bytes(), res[:0], &l.fx); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*100), "ns/receive+ack")
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(received), "ns/msg")
			b.StopTimer()
			if err := l.e.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkColdDrain receives, loads and acknowledges messages that are only in the store.
func BenchmarkColdDrain(b *testing.B) {
	l := openTest(b, Options{FS: vfs.Default, Dir: b.TempDir(), RecentBytes: -1})
	index := uint64(0)
	entry := publishEntry(l.now, 2000, 100, 1)
	const rounds = 200
	for range rounds {
		index++
		if _, err := l.e.Apply(index, 1, entry, nil, &l.fx); err != nil {
			b.Fatal(err)
		}
	}
	if _, err := l.e.Checkpoint(); err != nil {
		b.Fatal(err)
	}
	apply := func(c Command) []Result {
		var eb EntryBuilder
		eb.Reset(1, l.now, 256)
		eb.Add(0, 0, 0, c.AppendTo(nil))
		index++
		res, err := l.e.Apply(index, 1, eb.Bytes(), nil, &l.fx)
		if err != nil {
			b.Fatal(err)
		}
		return res
	}
	group, left := 0, 0
	var acks []Receipt
	for b.Loop() {
		if left == 0 {
			group, left = group+1, rounds*2000
		}
		name := fmt.Sprint("g", group)
		ds := apply(&Receive{Topic: "bench", Group: name, Max: 10, Visibility: time.Minute})[0].Deliveries
		if len(ds) != 10 {
			b.Fatal(len(ds))
		}
		left -= 10
		if err := l.e.Load(ds); err != nil {
			b.Fatal(err)
		}
		acks = acks[:0]
		for _, d := range ds {
			acks = append(acks, d.Receipt)
		}
		apply(&Settle{Topic: "bench", Group: name, Op: Acknowledge, Receipts: acks})
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*10), "ns/msg")
	b.StopTimer()
	if err := l.e.Close(); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkSealer(b *testing.B) {
	s := NewSealer(make([]byte, 32))
	id := MessageID{Shard: 0, Index: 1 << 24, Pos: 77, Kind: KindPlain}
	rc := Receipt{Topic: 300, Group: 301, Offset: 1 << 30, Epoch: 1 << 28}
	b.Run("id", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = s.MessageID(id)
		}
	})
	b.Run("receipt", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = s.Receipt(rc)
		}
	})
	text := s.Receipt(rc)
	b.Run("parse receipt", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.ParseReceipt(text); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkInspect(b *testing.B) {
	p := &Publish{Topic: "bench"}
	for range 100 {
		p.Messages = append(p.Messages, NewMessage{ContentType: "application/json", Retention: 24 * time.Hour, Body: make([]byte, 1024)})
	}
	cmd := p.AppendTo(nil)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Inspect(cmd); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEntryBuild(b *testing.B) {
	cmd := (&Publish{Topic: "bench", Messages: []NewMessage{{Body: make([]byte, 1024)}}}).AppendTo(nil)
	b.SetBytes(int64(len(cmd)) * 240)
	b.ReportAllocs()
	for b.Loop() {
		var eb EntryBuilder
		eb.Reset(1, Stamp{1, 1}, 240*(len(cmd)+EntryOverhead))
		for i := range 240 {
			eb.Add(1, uint64(i), 0, cmd)
		}
	}
}
