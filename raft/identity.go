package raft

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/wal/disk"
)

// What a data directory holds:
//
//	lock          held by the process that uses the directory
//	node.json     who this is: written when the directory is born, again when the cluster is known
//	members.json  what was last known of the other members; losing it loses nothing
//	wal/          the write-ahead log
//	engine/       the store
const (
	lockName     = "lock"
	identityName = "node.json"
	membersName  = "members.json"
	walDirName   = "wal"
	storeDirName = "engine"
)

// dataFormat is the layout this release writes and the newest it reads.
const dataFormat = 1

// identity is the content of node.json.
type identity struct {
	Format int `json:"format"`
	// Name and Incarnation make the node's ID. The incarnation is drawn when the directory is born, so a node
	// that lost its directory comes back as a stranger (R1).
	Name        string `json:"name"`
	Incarnation string `json:"incarnation"`
	// Cluster is empty until the node knows which cluster it belongs to.
	Cluster string `json:"cluster,omitempty"`
	// Previous is the cluster that the state may still speak of after Recover, until the entry that renames it
	// has been applied.
	Previous string `json:"previous,omitempty"`
}

// id is the node's identity in the cluster.
func (i identity) id() engine.NodeID { return nodeID(i.Name, i.Incarnation) }

// nodeID joins a name and an incarnation.
func nodeID(name, incarnation string) engine.NodeID { return engine.NodeID(name + "." + incarnation) }

// splitID is the inverse of nodeID.
func splitID(id engine.NodeID) (name, incarnation string) {
	i := strings.LastIndexByte(string(id), '.')
	if i < 0 {
		return string(id), ""
	}
	return string(id[:i]), string(id[i+1:])
}

// nameOf returns the name in an identity.
func nameOf(id engine.NodeID) string {
	name, _ := splitID(id)
	return name
}

// dataDir is an opened, locked data directory.
type dataDir struct {
	fs   disk.FS
	path string
	lock io.Closer
	id   identity
	// born says that the directory was empty.
	born bool
}

// openDataDir locks dir and reads or makes its identity.
func openDataDir(fs disk.FS, path, name string) (*dataDir, error) {
	if err := fs.MkdirAll(path); err != nil {
		return nil, err
	}
	lock, err := fs.Lock(filepath.Join(path, lockName))
	if err != nil {
		if errors.Is(err, disk.ErrLocked) {
			return nil, &StartError{Kind: ErrLocked, Message: fmt.Sprintf("%s is in use by another process", path),
				Remedy: "stop the other process, or choose another --data"}
		}
		return nil, err
	}
	d := &dataDir{fs: fs, path: path, lock: lock}
	if err := d.load(name); err != nil {
		_ = lock.Close()
		return nil, err
	}
	return d, nil
}

func (d *dataDir) load(name string) error {
	raw, err := readFile(d.fs, filepath.Join(d.path, identityName))
	if errors.Is(err, disk.ErrNotExist) {
		return d.birth(name)
	}
	if err != nil {
		return err
	}
	var id identity
	if err := parseIdentity(raw, &id); err != nil {
		return &StartError{Kind: ErrDamaged, Message: fmt.Sprintf("%s cannot be read", filepath.Join(d.path, identityName)),
			Remedy: replaceRemedy(name), Cause: err}
	}
	if id.Format > dataFormat {
		return &StartError{Kind: ErrForeign, Message: fmt.Sprintf("%s was written by a newer release (format %d, this one reads up to %d)", d.path, id.Format, dataFormat),
			Remedy: "start that release"}
	}
	if id.Name != name {
		return &StartError{Kind: ErrForeign, Message: fmt.Sprintf("%s belongs to node %s, not to %s", d.path, id.Name, name),
			Remedy: "check --node-id and --data"}
	}
	d.id = id
	return nil
}

// parseIdentity reads the content of node.json.
func parseIdentity(raw []byte, id *identity) error {
	if err := json.Unmarshal(raw, id); err != nil {
		return err
	}
	if id.Incarnation == "" || id.Name == "" {
		return errors.New("it names no node")
	}
	return nil
}

// birth gives an empty directory its identity. A directory that holds a log or a store but no identity is not
// empty, and not ours to begin anew in.
func (d *dataDir) birth(name string) error {
	for _, sub := range []string{walDirName, storeDirName} {
		if names, err := d.fs.List(filepath.Join(d.path, sub)); err == nil && len(names) > 0 {
			return &StartError{Kind: ErrDamaged, Message: fmt.Sprintf("%s holds %s but no %s", d.path, sub, identityName),
				Remedy: replaceRemedy(name)}
		}
	}
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails, by its contract
	d.born = true
	return d.setIdentity(identity{Format: dataFormat, Name: name, Incarnation: hex.EncodeToString(b[:])})
}

// setIdentity writes node.json.
func (d *dataDir) setIdentity(id identity) error {
	raw, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return err
	}
	if err := writeFile(d.fs, filepath.Join(d.path, identityName), append(raw, '\n')); err != nil {
		return err
	}
	d.id = id
	return nil
}

func (d *dataDir) close() error { return d.lock.Close() }

func (d *dataDir) join(name string) string { return filepath.Join(d.path, name) }

// replaceRemedy is what brings a node with a lost or damaged directory back.
func replaceRemedy(name string) string {
	return fmt.Sprintf("on another node: tercet cluster replace %s --server URL; then empty the directory and: tercet server --node-id %s … --join H:P[,H:P]", name, name)
}

// smallFileMax bounds the files that readFile reads.
const smallFileMax = 1 << 20

func readFile(fs disk.FS, name string) ([]byte, error) {
	f, err := fs.Open(name, disk.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > smallFileMax {
		return nil, fmt.Errorf("%s: %d bytes are too many", name, size)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil && !(errors.Is(err, io.EOF) && size == 0) {
		return nil, err
	}
	return b, nil
}

// writeFile replaces a small file: the new content is on disk before the name leads to it.
func writeFile(fs disk.FS, name string, content []byte) error {
	tmp := name + ".tmp"
	if err := fs.Remove(tmp); err != nil && !errors.Is(err, disk.ErrNotExist) {
		return err
	}
	f, err := fs.Create(tmp, disk.Buffered)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(content, 0); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := fs.Rename(tmp, name); err != nil {
		return err
	}
	return fs.SyncDir(filepath.Dir(name))
}
