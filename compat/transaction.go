package compat

import (
	"tercet.dev/tercet/compat/command"
	"tercet.dev/tercet/compat/resp"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// transaction is what MULTI collects.
type transaction struct {
	commands []queued
	bytes    int
	// dirty is set when a command was refused while it was queued: EXEC fails.
	dirty bool
}

// queued is one command of a transaction, with arguments of its own.
type queued struct {
	spec *command.Spec
	args [][]byte
}

// queuedOverhead is what a queued command and each of its arguments count beyond their bytes.
const queuedOverhead = 48

func (c *conn) queueCommand(spec *command.Spec, args [][]byte) {
	t := c.multi
	size := queuedOverhead
	for _, a := range args {
		size += len(a) + queuedOverhead
	}
	if t.bytes+size > c.s.limits.TransactionBytes {
		t.commands = nil
		c.reject(spec, "ERR the transaction is larger than "+itoa(int64(c.s.limits.TransactionBytes))+" bytes")
		return
	}
	t.bytes += size
	if !t.dirty {
		t.commands = append(t.commands, queued{spec, cloneArgs(args)})
	}
	c.desc.set(func(d *description) { d.multi = len(t.commands) })
	c.w.Simple("QUEUED")
	c.emit()
}

// cloneArgs copies arguments out of the reader's buffer.
func cloneArgs(args [][]byte) [][]byte {
	size := 0
	for _, a := range args {
		size += len(a)
	}
	all := make([]byte, 0, size)
	out := make([][]byte, len(args))
	for i, a := range args {
		all = append(all, a...)
		out[i] = all[len(all)-len(a):]
	}
	return out
}

func cmdMulti(c *conn, _ [][]byte) {
	c.multi = &transaction{}
	c.desc.set(func(d *description) { d.multi = 0 })
	c.w.OK()
}

func (c *conn) endTransaction() {
	c.multi, c.watches = nil, nil
	c.desc.set(func(d *description) { d.multi, d.watch = -1, 0 })
}

func cmdDiscard(c *conn, _ [][]byte) {
	if c.multi == nil {
		c.w.Error("ERR DISCARD without MULTI")
		return
	}
	c.endTransaction()
	c.w.OK()
}

// cmdExec carries a transaction out. What concerns the engine becomes one command, and so one place in the log; the rest is
// answered while the reply is made.
func cmdExec(c *conn, _ [][]byte) {
	t := c.multi
	if t == nil {
		c.w.Error("ERR EXEC without MULTI")
		return
	}
	watches := c.watches
	c.endTransaction()
	if t.dirty {
		c.w.Error("EXECABORT Transaction discarded because of previous errors.")
		return
	}
	parts := make([]execPart, len(t.commands))
	exec := engine.Exec{Watches: watches}
	for i, q := range t.commands {
		p := &parts[i]
		h := &handlers[q.spec.ID]
		c.s.metrics.commands.WithLabelValues(q.spec.Name).Inc()
		if h.build == nil {
			p.local = q
			continue
		}
		op, ok := h.build(c, q.args)
		if !ok {
			p.text = append([]byte(nil), c.w.B...)
			c.w.B = c.w.B[:0]
			continue
		}
		p.word = op.word
		if op.command != nil {
			// The builders reuse what they return; here several are alive at once.
			exec.Ops = append(exec.Ops, engine.ExecOp{Command: detach(op.command)})
		} else {
			exec.Ops = append(exec.Ops, engine.ExecOp{Query: op.query})
		}
	}
	var after []byte
	if c.tracking.tracked() {
		after = c.invalidations(t)
	}
	if len(exec.Ops) == 0 && len(watches) == 0 {
		c.wordExec(&c.w, parts, nil)
		c.w.B = append(c.w.B, after...)
		return
	}
	word := func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
		if r.Code == errs.KeyChanged {
			w.NullArray()
			return
		}
		if r.Code != errs.OK || r.Stream == nil {
			w.Error(refusalText(r.Code))
			return
		}
		c.wordExec(w, parts, r.Stream.Exec)
	}
	cmd := exec.AppendTo(make([]byte, 0, t.bytes+64))
	local := false
	for i := range parts {
		local = local || parts[i].local.spec != nil
	}
	if !local {
		c.submit(cmd, word, after)
		return
	}
	// Local commands run on this goroutine, between the engine's results and anything that follows.
	if !c.settle() {
		return
	}
	ctx, cancel := c.requestContext()
	defer cancel()
	reply, err := c.s.backend.Propose(ctx, raft.Proposal{Command: cmd})
	wordOutcome(&c.w, word, &reply.Result, err)
	c.w.B = append(c.w.B, after...)
}

// execPart is how one command of a transaction is answered.
type execPart struct {
	// text is an error that was found before anything was done.
	text []byte
	// local is answered without the engine.
	local queued
	// word words the next of the engine's results.
	word wordFunc
}

func (c *conn) wordExec(w *resp.Buffer, parts []execPart, results []engine.ExecResult) {
	w.Array(len(parts))
	for i := range parts {
		p := &parts[i]
		switch {
		case p.text != nil:
			w.Raw(p.text)
		case p.local.spec != nil:
			w.Raw(c.localReply(p.local))
		case len(results) == 0:
			w.Error("ERR internal error")
		default:
			p.word(w, &results[0].Result, results[0].Answer)
			results = results[1:]
		}
	}
}

// localReply runs a command that needs no engine, inside a transaction.
func (c *conn) localReply(q queued) []byte {
	saved := c.w
	c.w = resp.Buffer{V3: saved.V3}
	c.inExec = true
	handlers[q.spec.ID].local(c, q.args)
	c.inExec = false
	out := c.w.B
	saved.V3 = c.w.V3
	c.w = saved
	return out
}

// invalidations are those of all keys that a transaction's reads named.
func (c *conn) invalidations(t *transaction) []byte {
	w := resp.Buffer{V3: true}
	for _, q := range t.commands {
		if !q.spec.Is(command.ReadOnly) {
			continue
		}
		c.invalidateRead(&w, q.args, q.spec.Keys(nil, q.args))
	}
	return w.B
}

func cmdWatch(c *conn, a [][]byte) {
	if len(c.watches)+len(a)-1 > c.s.limits.Watches {
		c.w.Error("ERR a transaction may watch " + itoa(int64(c.s.limits.Watches)) + " keys")
		return
	}
	keys := make([]string, len(a)-1)
	for i, k := range a[1:] {
		keys[i] = string(k)
	}
	readOnly := c.readOnly
	c.readOnly = false // a version must not be a stale one
	answer, err := c.read(&engine.Query{Kind: engine.QueryKeys, Stream: &engine.StreamQuery{Keys: keys}})
	c.readOnly = readOnly
	if err != nil {
		c.w.Error(errorText(err))
		return
	}
	for i, k := range answer.Stream.Keys {
		known := false
		for _, w := range c.watches {
			known = known || w.Key == keys[i]
		}
		if !known {
			c.watches = append(c.watches, engine.Watch{Key: keys[i], Version: k.Version})
		}
	}
	c.desc.set(func(d *description) { d.watch = len(c.watches) })
	c.w.OK()
}

func cmdUnwatch(c *conn, _ [][]byte) {
	c.watches = nil
	c.desc.set(func(d *description) { d.watch = 0 })
	c.w.OK()
}
