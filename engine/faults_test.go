package engine

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// childEnv marks the process in which faults are injected: where Pebble gives up for good it leaves goroutines
// behind, which is right for a process that is about to end and wrong for the leak check of the others.
const childEnv = "TERCET_ENGINE_FAULTS"

// inChild runs the calling test once more in a process of its own.
func inChild(t *testing.T) bool {
	t.Helper()
	if os.Getenv(childEnv) != "" {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=30m")
	if testing.Short() {
		cmd.Args = append(cmd.Args, "-test.short")
	}
	cmd.Env = append(os.Environ(), childEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- ") && line != "PASS\n" {
			t.Log(strings.TrimSpace(line))
		}
	}
	return false
}

// guarded runs f on a goroutine of its own and returns early where Pebble would have ended the process, which
// stands still from then on: o is set up for that.
func guarded(o *Options, f func() error) error {
	done := make(chan error, 1)
	report := func(err error) {
		select {
		case done <- err:
		default:
		}
	}
	o.OnFatal = report
	o.fatal = func() {
		report(errors.New("the store gave up"))
		select {} // the process would have ended
	}
	go func() {
		defer func() {
			if p := recover(); p != nil {
				report(fmt.Errorf("panic: %v", p))
			}
		}()
		report(f())
	}()
	return <-done
}

// failing fails the k-th operation, and all later ones if sticky.
type failing struct {
	k      int64
	sticky bool
	count  atomic.Int64
	failed atomic.Bool
	what   atomic.Value
	die    func()
	dead   atomic.Bool // the process is taken for ended: nothing moves any more
}

var errInjected = errors.New("injected")

// MaybeError implements errorfs.Injector.
func (f *failing) MaybeError(op errorfs.Op) error {
	if f.dead.Load() {
		select {}
	}
	n := f.count.Add(1)
	if n == f.k || f.sticky && n > f.k {
		if f.failed.CompareAndSwap(false, true) {
			f.what.Store(fmt.Sprintf("%v %s", op.Kind, op.Path))
		}
		if op.Kind == errorfs.OpFileSync && strings.HasPrefix(filepath.Base(op.Path), generationPrefix) ||
			strings.HasSuffix(op.Path, ".blob") && op.Kind.ReadOrWrite() == errorfs.OpIsWrite {
			f.die() // Pebble panics, on whatever goroutine it is, when it cannot sync its directory or finish a blob file
		}
		return errInjected
	}
	return nil
}

// String implements errorfs.Injector.
func (f *failing) String() string { return "failing" }

// TestEveryOperationFails fails the k-th file operation of a run with checkpoints, an export and an install
// of it. Whatever the engine said was durable is there afterwards, it never gave a wrong result, and the
// state it comes back with is that of the log.
func TestEveryOperationFails(t *testing.T) {
	if !inChild(t) {
		return
	}
	w := makeWorkload(t, 77, 60)
	donor := openTest(t, Options{})
	if err := w.follow(donor.e, 40); err != nil {
		t.Fatal(err)
	}
	donor.checkpoint()
	run := func(e *Engine, durable *atomic.Uint64) error {
		for end := 1; end <= 30; end++ {
			if err := w.follow(e, end); err != nil {
				return err
			}
			if end%10 == 5 {
				m, err := e.Checkpoint()
				if err != nil {
					return err
				}
				durable.Store(m.Index)
			}
		}
		x, err := e.Export()
		if err != nil {
			return err
		}
		err = x.copyTo(io.Discard)
		if err = errors.Join(err, x.Close()); err != nil {
			return err
		}
		if err := install(e, donor.e, durable); err != nil {
			return err
		}
		if err := w.finish(e); err != nil {
			return err
		}
		_, err = e.Checkpoint()
		return err
	}
	count := &failing{k: -1}
	probe := func(inj *failing, fs *vfs.MemFS) (uint64, error) {
		var durable atomic.Uint64
		o := Options{FS: errorfs.Wrap(fs, inj), Dir: "engine", RecentBytes: -1, MemTableBytes: 256 << 10, packBytes: 4 << 10, CacheBytes: 1 << 16}
		inj.die = func() { o.fatal() }
		err := guarded(&o, func() error {
			e, err := Open(o)
			if err != nil {
				return err
			}
			err = run(e, &durable)
			if e.Err() == nil {
				err = errors.Join(err, e.Close())
			}
			return err
		})
		inj.dead.Store(true)
		return durable.Load(), err
	}
	if _, err := probe(count, vfs.NewCrashableMem()); err != nil {
		t.Fatal(err)
	}
	total := count.count.Load()
	step := max(total/230, 1)
	if campaign() {
		step = 1
	}
	surfaced, unused := 0, 0
	kinds := map[string]int{}
	for k := int64(1); k <= total; k += step {
		for _, sticky := range []bool{false, true} {
			inj := &failing{k: k, sticky: sticky}
			fs := vfs.NewCrashableMem()
			durable, err := probe(inj, fs)
			what := fmt.Sprintf("operation %d (%v) sticky %v", k, inj.what.Load(), sticky)
			if err == nil {
				if sticky && inj.failed.Load() && k < total-30 {
					t.Errorf("%s: nobody noticed", what)
				}
				unused++
			} else {
				if !inj.failed.Load() {
					t.Errorf("%s: no operation failed, and yet: %v", what, err)
				}
				surfaced++
				kinds[strings.Fields(fmt.Sprint(inj.what.Load()))[0]]++
			}
			if strings.Contains(fmt.Sprint(err), "hash") || strings.Contains(fmt.Sprint(err), "gave") && !strings.Contains(fmt.Sprint(err), "gave up") {
				t.Fatalf("%s: wrong result: %v", what, err)
			}
			clone := fs.CrashClone(vfs.CrashCloneCfg{})
			e, err := Open(Options{FS: clone, Dir: "engine"})
			if err != nil {
				t.Fatalf("%s: cannot be opened afterwards: %v", what, err)
			}
			if got := e.Durable().Index; got < durable {
				t.Fatalf("%s: checkpoint of entry %d is lost, %d is there", what, durable, got)
			}
			if err := w.finish(e); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("%d operations, every %d-th failed once and for good: %d failures surfaced, %d did not matter; %v", total, step, surfaced, unused, kinds)
	if surfaced < 60 {
		t.Errorf("only %d failures had an effect", surfaced)
	}
	donor.close()
}

func (x *Export) copyTo(w io.Writer) error {
	for _, f := range x.Files {
		r, err := x.Open(f.Name)
		if err != nil {
			return err
		}
		n, err := io.Copy(w, r)
		if err = errors.Join(err, r.Close()); err != nil {
			return err
		}
		if n != f.Size {
			return fmt.Errorf("%s has %d bytes, listed were %d", f.Name, n, f.Size)
		}
	}
	return nil
}

// install sends the donor's checkpoint to e.
func install(e, donor *Engine, durable *atomic.Uint64) error {
	x, err := donor.Export()
	if err != nil {
		return err
	}
	err = func() error {
		in, err := e.BeginInstall()
		if err != nil {
			return err
		}
		for _, f := range x.Files {
			r, err := x.Open(f.Name)
			if err != nil {
				return err
			}
			w, err := in.Create(f.Name)
			if err != nil {
				return errors.Join(err, r.Close(), in.Abort())
			}
			_, err = io.Copy(w, r)
			if err = errors.Join(err, w.Close(), r.Close()); err != nil {
				return errors.Join(err, in.Abort())
			}
		}
		if err := in.Commit(x.Meta); err != nil {
			return errors.Join(err, in.Abort())
		}
		durable.Store(x.Meta.Index)
		if got := e.Durable().Index; got != x.Meta.Index {
			return fmt.Errorf("installed %d, durable is %d", x.Meta.Index, got)
		}
		if m, err := e.Checkpoint(); err != nil || m.Index != x.Meta.Index {
			return fmt.Errorf("checkpoint between install and reopen: %v, %w", m, err)
		}
		return e.Reopen()
	}()
	return errors.Join(err, x.Close())
}

// TestInstallCrash: power fails before any file operation of an install; what opens then is the old state or
// the new one, and the new one once Commit has returned.
func TestInstallCrash(t *testing.T) {
	w := makeWorkload(t, 5, 90)
	donor := openTest(t, Options{})
	if err := w.follow(donor.e, 60); err != nil {
		t.Fatal(err)
	}
	donor.checkpoint()
	// What came after the checkpoint is in the export in part: rows are, payloads are not.
	if err := w.follow(donor.e, 75); err != nil {
		t.Fatal(err)
	}
	if err := donor.e.db.Flush(); err != nil {
		t.Fatal(err)
	}
	rounds := 4
	if campaign() {
		rounds = 200
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("first seed %d", seed)
	crashes, old, fresh := 0, 0, 0
	for round := range rounds {
		rng := rand.New(rand.NewPCG(seed, uint64(round)))
		fs := vfs.NewCrashableMem()
		c := newCrasher(fs, rng, 1)
		o := Options{FS: errorfs.Wrap(fs, c), Dir: "engine", RecentBytes: -1, CacheBytes: 1 << 20, MemTableBytes: 256 << 10}
		e, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.follow(e, 20); err != nil {
			t.Fatal(err)
		}
		if _, err := e.Checkpoint(); err != nil {
			t.Fatal(err)
		}
		var durable atomic.Uint64
		durable.Store(20)
		c.mu.Lock()
		c.durable = durable.Load
		c.mu.Unlock()
		if err := install(e, donor.e, &durable); err != nil {
			t.Fatal(err)
		}
		c.mu.Lock()
		c.durable = nil
		points := c.points
		c.mu.Unlock()
		if err := w.finish(e); err != nil {
			t.Fatal(err)
		}
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		for i, p := range points {
			o.FS = p.fs
			e, err := Open(o)
			if err != nil {
				t.Fatalf("seed %d round %d crash %d: %v", seed, round, i, err)
			}
			switch got := e.Durable().Index; {
			case got == 20 && p.durable == 20:
				old++
			case got == 60:
				fresh++
			default:
				t.Fatalf("seed %d round %d crash %d: state of entry %d, want at least %d", seed, round, i, got, p.durable)
			}
			if err := w.finish(e); err != nil {
				t.Fatalf("seed %d round %d crash %d: %v", seed, round, i, err)
			}
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
			crashes++
		}
	}
	t.Logf("%d crashes: %d left the old state, %d the new", crashes, old, fresh)
	if old == 0 || fresh == 0 {
		t.Error("the crashes were all on one side")
	}
	donor.close()
}

// TestInstallRefuses: what is not the state it claims to be is not switched to.
func TestInstallRefuses(t *testing.T) {
	w := makeWorkload(t, 6, 60)
	donor := openTest(t, Options{})
	if err := w.follow(donor.e, 60); err != nil {
		t.Fatal(err)
	}
	donor.checkpoint()
	x, err := donor.e.Export()
	if err != nil {
		t.Fatal(err)
	}
	l := openTest(t, Options{})
	if err := w.follow(l.e, 10); err != nil {
		t.Fatal(err)
	}
	l.checkpoint()
	try := func(meta Meta, mangle func(name string, b []byte) []byte) error {
		in, err := l.e.BeginInstall()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range x.Files {
			r, err := x.Open(f.Name)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(r)
			if err = errors.Join(err, r.Close()); err != nil {
				t.Fatal(err)
			}
			if b = mangle(f.Name, b); b == nil {
				continue
			}
			o, err := in.Create(f.Name)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := o.Write(b); err != nil {
				t.Fatal(err)
			}
			if err := o.Close(); err != nil {
				t.Fatal(err)
			}
		}
		err = in.Commit(meta)
		if err := in.Abort(); err != nil {
			t.Fatal(err)
		}
		return err
	}
	same := func(_ string, b []byte) []byte { return b }
	if err := try(Meta{Index: x.Meta.Index + 1, Term: 1}, same); err == nil {
		t.Error("a state of another index was taken")
	}
	tables := 0
	for _, f := range x.Files {
		if !strings.HasSuffix(f.Name, ".sst") && !strings.HasSuffix(f.Name, ".blob") {
			continue
		}
		tables++
		if err := try(x.Meta, func(name string, b []byte) []byte {
			if name == f.Name {
				b[len(b)/3] ^= 1
			}
			return b
		}); err == nil {
			t.Errorf("a damaged %s was taken", f.Name)
		}
		if err := try(x.Meta, func(name string, b []byte) []byte {
			if name == f.Name {
				return nil
			}
			return b
		}); err == nil {
			t.Errorf("a state without %s was taken", f.Name)
		}
	}
	if tables == 0 {
		t.Error("the state has no tables")
	}
	in, err := l.e.BeginInstall()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", ".", "..", "../CURRENT", "a/b", `a\b`, "a\x00b", "/etc/passwd"} {
		if _, err := in.Create(name); err == nil {
			t.Errorf("file name %q was taken", name)
		}
	}
	if err := in.Abort(); err != nil {
		t.Fatal(err)
	}
	if err := w.finish(l.e); err != nil {
		t.Error(err)
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	l.close()
	donor.close()
}

// TestBitFlips: a flipped bit anywhere in a stopped store is detected, or harmless, shown by equal results
// and rows.
func TestBitFlips(t *testing.T) {
	if !inChild(t) {
		return
	}
	w := makeWorkload(t, 9, 120)
	fs := vfs.NewMem()
	o := Options{FS: fs, Dir: "engine", RecentBytes: -1, MemTableBytes: 256 << 10, packBytes: 4 << 10}
	e, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	for end := 1; end <= 100; end++ {
		if err := w.follow(e, end); err != nil {
			t.Fatal(err)
		}
		if end%25 == 0 {
			if _, err := e.Checkpoint(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	var walk func(dir string)
	walk = func(dir string) {
		names, err := fs.List(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			path := fs.PathJoin(dir, name)
			if st, err := fs.Stat(path); err != nil {
				t.Fatal(err)
			} else if st.IsDir() {
				walk(path)
				continue
			}
			f, err := fs.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(f)
			if err = errors.Join(err, f.Close()); err != nil {
				t.Fatal(err)
			}
			files[path] = b
		}
	}
	walk("engine")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	perFile := 60
	if campaign() {
		perFile = 5000
	}
	detected, harmless := map[string]int{}, map[string]int{}
	for _, path := range sortedKeys(files) {
		bits := len(files[path]) * 8
		n := min(bits, perFile)
		for i := range n {
			bit := i
			if n < bits {
				bit = rng.IntN(bits)
			}
			mem := vfs.NewMem()
			if err := mem.MkdirAll("engine/gen-000001", 0o755); err != nil {
				t.Fatal(err)
			}
			for p, b := range files {
				if p == path {
					b = append([]byte(nil), b...)
					b[bit/8] ^= 1 << (bit % 8)
				}
				f, err := mem.Create(p, vfs.WriteCategoryUnspecified)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.Write(b); err != nil {
					t.Fatal(err)
				}
				if err := f.Close(); err != nil {
					t.Fatal(err)
				}
			}
			o.FS = mem
			kind := path[strings.LastIndexAny(path, "./")+1:]
			if strings.Contains(path, "MANIFEST-") {
				kind = "MANIFEST"
			} else if strings.Contains(path, "OPTIONS-") {
				kind = "OPTIONS"
			} else if strings.Contains(path, "marker.") {
				kind = "marker"
			} else if strings.Contains(path, packPrefix) {
				kind = "pack"
			}
			err := guarded(&o, func() error {
				e, err := Open(o)
				if err != nil {
					return err
				}
				if err = w.finish(e); e.Err() == nil {
					err = errors.Join(err, e.Close())
				}
				return err
			})
			switch {
			case err == nil:
				harmless[kind]++
			case strings.Contains(err.Error(), "hash is") || strings.Contains(err.Error(), "gave\n"):
				t.Errorf("bit %d of %s was served: %.300v", bit, path, err)
			default:
				detected[kind]++
			}
		}
	}
	t.Logf("detected %v, harmless %v", detected, harmless)
	if detected["sst"] == 0 || detected["pack"] == 0 || detected["MANIFEST"] == 0 || detected["CURRENT"] == 0 {
		t.Error("no flip was detected where most should be")
	}
}
