package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/term"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/internal/limits"
)

// batchBytesTarget is where a batch of lines is closed: well below what a server takes.
const batchBytesTarget = 1 << 20

// line is one message of the input.
type line struct {
	number int
	key    string
	body   []byte
}

// sentLines is what `tercet send --jsonl` says at the end.
type sentLines struct {
	// Lines are those read, without empty ones. Each was sent, refused for good, or given up on.
	Lines   int `json:"lines"`
	Sent    int `json:"sent"`
	Refused int `json:"refused"`
	Unsent  int `json:"unsent"`
	// FirstUnsent is the first line given up on, 0 for none.
	FirstUnsent int `json:"firstUnsent,omitempty"`
	// Repeated counts messages that were sent again because it was not known whether they had been stored. Their
	// idempotency keys see to it that they are stored once.
	Repeated int `json:"repeated"`
	// Run is what the keys of the lines begin with, empty if a field of theirs is the key.
	Run string `json:"run,omitempty"`
	// Zones is the least number of zones that held a message when it was acknowledged.
	Zones   int     `json:"zones"`
	Seconds float64 `json:"seconds"`
}

func (s *sentLines) text(w io.Writer) error {
	_, err := fmt.Fprintf(w, "%d of %d messages sent in %.1f s, each on %d zones or more", s.Sent, s.Lines, s.Seconds, s.Zones)
	if err == nil && s.Repeated > 0 {
		_, err = fmt.Fprintf(w, "; %d of them more than once, and stored once", s.Repeated)
	}
	if err == nil {
		_, err = fmt.Fprintln(w)
	}
	return err
}

// lineSender sends the lines of one input.
type lineSender struct {
	app        *app
	client     *client.Client
	topic      string
	form       client.Message
	durability client.Durability
	// run begins the keys of the lines, unless keyField names the field that holds them.
	run, keyField string
	// stop ends the reading after a batch was given up on: what follows would only wait as long.
	stop context.CancelFunc

	mu      sync.Mutex
	sum     sentLines
	failure error // the first
}

func (a *app) sendLines(ctx context.Context, cl *client.Client, topic string, o *sendOptions) error {
	form, durability, err := o.message()
	if err != nil {
		return err
	}
	if form.ContentType == "" {
		form.ContentType = "application/json"
	}
	start := time.Now()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	s := &lineSender{app: a, client: cl, topic: topic, form: form, durability: durability, run: o.run, keyField: o.keyField, stop: stop}
	if s.run == "" && s.keyField == "" {
		s.run = rand.Text()
	}
	s.sum.Run = s.run

	lines, batches := make(chan line, 4*o.batch), make(chan []line)
	readErr := make(chan error, 1)
	go func() {
		readErr <- s.read(ctx, a.in, lines)
		close(lines)
	}()
	go func() {
		group(ctx, lines, batches, o.batch)
		close(batches)
	}()
	endProgress := s.progress(start)
	var senders sync.WaitGroup
	for range o.inflight {
		senders.Go(func() {
			for batch := range batches {
				s.send(ctx, batch)
			}
		})
	}
	senders.Wait()
	endProgress()

	s.mu.Lock()
	defer s.mu.Unlock()
	s.sum.Unsent = s.sum.Lines - s.sum.Sent - s.sum.Refused
	s.sum.Seconds = time.Since(start).Seconds()
	if err := a.print(s.sum, s.sum.text); err != nil {
		return err
	}
	if s.failure != nil {
		if s.sum.FirstUnsent > 0 {
			again := ""
			if s.run != "" {
				again = " with --run " + s.run
			}
			a.note("%d lines were not sent, line %d the first of them; send the same input again%s: what is stored is not stored twice",
				s.sum.Unsent, s.sum.FirstUnsent, again)
		}
		return s.failure
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if err := <-readErr; err != nil {
		return err
	}
	if s.sum.Refused > 0 {
		return fmt.Errorf("%d of %d lines were refused", s.sum.Refused, s.sum.Lines)
	}
	return nil
}

// read cuts the input into lines. It returns when the input or the context ends; a read that waits for input at
// that moment ends with the process.
func (s *lineSender) read(ctx context.Context, in io.Reader, lines chan<- line) error {
	r := bufio.NewReaderSize(in, 256<<10)
	for number := 1; ; number++ {
		body, tooLong, err := readLine(r, limits.MessageBytesMax)
		body = bytes.TrimSpace(body)
		if len(body) > 0 || tooLong {
			s.mu.Lock()
			s.sum.Lines++
			s.mu.Unlock()
			switch {
			case tooLong:
				s.refuse(number, fmt.Sprintf("longer than %d bytes", limits.MessageBytesMax))
			case !json.Valid(body):
				s.refuse(number, "not JSON")
			default:
				key, err := s.key(number, body)
				if err != nil {
					s.refuse(number, err.Error())
					break
				}
				select {
				case lines <- line{number, key, body}:
				case <-ctx.Done():
					return nil
				}
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read line %d: %w", number, err)
		}
	}
}

// key is the idempotency key of a line.
func (s *lineSender) key(number int, body []byte) (string, error) {
	if s.keyField == "" {
		return s.run + "-" + strconv.Itoa(number), nil
	}
	var fields map[string]json.RawMessage
	if json.Unmarshal(body, &fields) != nil {
		return "", errors.New("not a JSON object, which --key-field needs")
	}
	raw := fields[s.keyField]
	var key string
	if len(raw) > 0 && (raw[0] == '-' || raw[0] >= '0' && raw[0] <= '9') {
		key = string(raw)
	} else if json.Unmarshal(raw, &key) != nil {
		return "", fmt.Errorf("its field %q, the key, is neither text nor a number", s.keyField)
	}
	return key, validKey(key)
}

// validKey checks an idempotency key, which travels in a header.
func validKey(key string) error {
	if key == "" || len(key) > limits.IdempotencyKeyBytesMax {
		return fmt.Errorf("an idempotency key has 1 to %d bytes", limits.IdempotencyKeyBytesMax)
	}
	for i := range len(key) {
		if key[i] < ' ' || key[i] == 0x7f {
			return errors.New("an idempotency key has no control characters")
		}
	}
	return nil
}

// readLine returns the next line in memory of its own. What a line has beyond the limit is read and dropped.
func readLine(r *bufio.Reader, limit int) (body []byte, tooLong bool, err error) {
	for {
		part, err := r.ReadSlice('\n')
		if len(body)+len(part) > limit+2 { // the line feed does not count, nor a carriage return
			tooLong = true
			body = nil
		}
		if !tooLong {
			body = append(body, part...)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return body, tooLong, err
		}
	}
}

func (s *lineSender) refuse(number int, why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sum.Refused++
	s.app.note("line %d was left out: %s", number, why)
}

// group collects lines into batches. A batch is offered to the senders from its first line on and grows until one
// takes it: batches are as large as the input is fast, and no line waits for others.
func group(ctx context.Context, lines <-chan line, batches chan<- []line, count int) {
	var batch []line
	size := 0
	for {
		in, out := lines, batches
		if len(batch) == 0 {
			out = nil
		}
		if len(batch) >= count || size >= batchBytesTarget {
			in = nil
		} else {
			// What is there already comes along.
			select {
			case l, ok := <-in:
				if ok {
					batch = append(batch, l)
					size += len(l.body)
					continue
				}
				if len(batch) > 0 {
					select {
					case batches <- batch:
					case <-ctx.Done():
					}
				}
				return
			default:
			}
		}
		select {
		case l, ok := <-in:
			if ok { // else the branch above ends it
				batch = append(batch, l)
				size += len(l.body)
			}
		case out <- batch:
			batch, size = nil, 0
		case <-ctx.Done():
			return
		}
	}
}

// send sends one batch. The client tries again what was refused for the moment, and, since each line has a key, what
// is not known to have been stored.
func (s *lineSender) send(ctx context.Context, batch []line) {
	messages := make([]client.Message, len(batch))
	for i, l := range batch {
		messages[i] = s.form
		messages[i].Key, messages[i].Body = l.key, l.body
	}
	results, stored, err := s.client.SendBatch(ctx, s.topic, messages, s.durability)
	if err != nil {
		s.giveUp(ctx, batch, err)
		return
	}
	s.tally(batch, results, stored)
}

// pause waits; it reports false when the context ends first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *lineSender) tally(batch []line, results []client.SentMessage, stored client.Stored) {
	refused := map[int]string{}
	for i, r := range results {
		if r.Err != nil {
			refused[batch[i].number] = r.Err.Error()
		}
	}
	s.mu.Lock()
	s.sum.Sent += len(results) - len(refused)
	if s.sum.Zones == 0 || stored.Zones < s.sum.Zones {
		s.sum.Zones = stored.Zones
	}
	if stored.Repeated {
		s.sum.Repeated += len(batch)
	}
	s.mu.Unlock()
	for number, why := range refused {
		s.refuse(number, why)
	}
}

func (s *lineSender) giveUp(ctx context.Context, batch []line, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Batches that end because another one was given up on have no reason of their own.
	if s.failure == nil && !errors.Is(context.Cause(ctx), errInterrupted) {
		s.failure = err
	}
	if first := batch[0].number; s.sum.FirstUnsent == 0 || first < s.sum.FirstUnsent {
		s.sum.FirstUnsent = first
	}
	s.stop()
}

// progress shows on stderr how far it is: on a terminal in one line that is written over, else every few seconds.
func (s *lineSender) progress(start time.Time) (end func()) {
	every, format, last := 5*time.Second, "%d messages sent, %.0f a second\n", ""
	if f, ok := s.app.err.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		every, format, last = 200*time.Millisecond, "\r%d messages sent, %.0f a second ", "\r\x1b[K"
	}
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				s.mu.Lock()
				n := s.sum.Sent
				s.mu.Unlock()
				fmt.Fprintf(s.app.err, format, n, float64(n)/time.Since(start).Seconds())
			case <-done:
				fmt.Fprint(s.app.err, last)
				return
			}
		}
	}()
	return func() { close(done); <-ended }
}
