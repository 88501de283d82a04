package main

import (
	"context"
	"sync"
	"time"

	"tercet.dev/tercet/bench"
)

// inOrder waits for the confirmations of a pipeline's requests, one after the other.
type inOrder[F any] struct {
	ctx    context.Context
	await  func(context.Context, F) error
	queue  chan pending[F]
	waited sync.WaitGroup
}

type pending[F any] struct {
	futures []F
	ack     bench.Ack
	done    func(bench.Ack, error)
}

// newInOrder returns one whose goroutine ends with close.
func newInOrder[F any](ctx context.Context, await func(context.Context, F) error) *inOrder[F] {
	o := &inOrder[F]{ctx: ctx, await: await, queue: make(chan pending[F], 1<<16)}
	o.waited.Go(func() {
		for p := range o.queue {
			var failed error
			for _, f := range p.futures {
				if err := await(ctx, f); err != nil && failed == nil {
					failed = err
				}
			}
			if failed != nil {
				p.done(bench.Ack{}, failed)
			} else {
				p.done(p.ack, nil)
			}
		}
	})
	return o
}

func (o *inOrder[F]) add(futures []F, ack bench.Ack, done func(bench.Ack, error)) {
	o.queue <- pending[F]{futures, ack, done}
}

func (o *inOrder[F]) close() {
	close(o.queue)
	o.waited.Wait()
}

// gather waits a while for a first message and takes along what else is there.
func gather[M any](ctx context.Context, arrived <-chan M, into []M) []M {
	timer := time.NewTimer(firstMessageWait)
	defer timer.Stop()
	select {
	case m, ok := <-arrived:
		if !ok {
			return into
		}
		into = append(into, m)
	case <-timer.C:
		return into
	case <-ctx.Done():
		return into
	}
	for len(into) < settleAt {
		select {
		case m, ok := <-arrived:
			if !ok {
				return into
			}
			into = append(into, m)
		default:
			return into
		}
	}
	return into
}
