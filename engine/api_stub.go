package engine

import (
	"errors"
	"io"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/go-hclog"
)

var errNotYet = errors.New("engine: being built")

// Options configures an Engine.
type Options struct {
	// Dir holds the generations of the store.
	Dir string
	// FS is the file system; nil is the operating system's.
	FS vfs.FS
	// Shard is this state machine's shard number.
	Shard uint16
	// CacheBytes, MemTableBytes and RecentBytes bound memory; 0 takes a default.
	CacheBytes, MemTableBytes, RecentBytes int64
	Logger                                 hclog.Logger
}

// Engine is the state machine of one shard.
type Engine struct{}

// Open opens the store.
func Open(o Options) (*Engine, error) { return nil, errNotYet }

// Close closes the store.
func (e *Engine) Close() error { return errNotYet }

// Apply applies an entry.
func (e *Engine) Apply(index, term uint64, entry []byte, results []Result, fx *Effects) ([]Result, error) {
	return results, errNotYet
}

// ApplyConfiguration applies a membership change.
func (e *Engine) ApplyConfiguration(index, term uint64, encoded []byte, members []Member, fx *Effects) error {
	return errNotYet
}

// ApplyEmpty applies an entry without commands.
func (e *Engine) ApplyEmpty(index, term uint64) error { return errNotYet }

// Applied returns the last applied index and its term.
func (e *Engine) Applied() (index, term uint64) { return 0, 0 }

// Stamp returns the last stamp.
func (e *Engine) Stamp() Stamp { return Stamp{} }

// InSync returns the in-sync set.
func (e *Engine) InSync() InSync { return InSync{} }

// ClusterID returns the cluster id, empty before Init.
func (e *Engine) ClusterID() string { return "" }

// Secret returns the cluster secret, nil before Init.
func (e *Engine) Secret() []byte { return nil }

// Level returns the replicated feature level.
func (e *Engine) Level() uint32 { return 0 }

// Members returns the membership.
func (e *Engine) Members() []Member { return nil }

// Load fills the contents of deliveries.
func (e *Engine) Load(ds []Delivery) error { return errNotYet }

// Park calls register under the lock if the group exists and nothing is deliverable.
func (e *Engine) Park(r *Receive, now Stamp, register func()) (parked bool, err error) {
	return false, errNotYet
}

// NextDue tells when the earliest unsettled message becomes deliverable.
func (e *Engine) NextDue(topic, group string) (cluster int64, ok bool) { return 0, false }

// Intake reports whether an intake is open.
func (e *Engine) Intake(id IntakeID) bool { return false }

// Query answers a read.
func (e *Engine) Query(q Query) (Answer, error) { return Answer{}, errNotYet }

// NeedsCheckpoint reports that a checkpoint is due by size.
func (e *Engine) NeedsCheckpoint() bool { return false }

// Checkpoint makes the applied state durable.
func (e *Engine) Checkpoint() (Meta, error) { return Meta{}, errNotYet }

// Durable returns the durable checkpoint's place.
func (e *Engine) Durable() Meta { return Meta{} }

// ExportFile is one file of an Export.
type ExportFile struct {
	Name string
	Size int64
}

// Export is a consistent copy of the durable state.
type Export struct {
	Meta  Meta
	Files []ExportFile
}

// Open opens one of the files.
func (x *Export) Open(name string) (io.ReadCloser, error) { return nil, errNotYet }

// Close deletes the copy.
func (x *Export) Close() error { return errNotYet }

// Export makes a copy of the durable state by hard links.
func (e *Engine) Export() (*Export, error) { return nil, errNotYet }

// Install is a state being received from another node.
type Install struct{}

// Create creates a file of the new generation.
func (in *Install) Create(name string) (io.WriteCloser, error) { return nil, errNotYet }

// Commit verifies, syncs and switches to the new generation.
func (in *Install) Commit(m Meta) error { return errNotYet }

// Abort drops the new generation.
func (in *Install) Abort() error { return errNotYet }

// BeginInstall begins a new generation.
func (e *Engine) BeginInstall() (*Install, error) { return nil, errNotYet }

// Reopen opens the generation that Install.Commit switched to.
func (e *Engine) Reopen() error { return errNotYet }

// StateHash returns the applied index and the hash of the state at it.
func (e *Engine) StateHash() (index uint64, hash uint64) { return 0, 0 }

// FullHash also hashes every stored row.
func (e *Engine) FullHash() (index uint64, hash uint64, err error) { return 0, 0, errNotYet }

// EncodeQuery appends the encoded query.
func AppendQuery(b []byte, q *Query) []byte { return b }

// DecodeQuery decodes a query.
func DecodeQuery(b []byte) (Query, error) { return Query{}, errNotYet }

// AppendAnswer appends the encoded answer.
func AppendAnswer(b []byte, a *Answer) []byte { return b }

// DecodeAnswer decodes an answer.
func DecodeAnswer(b []byte) (Answer, error) { return Answer{}, errNotYet }
