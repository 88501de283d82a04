package raft

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft/logstore"
	"tercet.dev/tercet/wal"
	"tercet.dev/tercet/wal/disk"
)

// RecoverReport is what Recover did, or would do.
type RecoverReport struct {
	// Node is the node's identity, ClusterID the new cluster's (the old one's when nothing was done).
	Node, ClusterID string
	// Applied is the last entry known to have been committed, Last the last one of the log. What lies between
	// is kept, though it may never have been acknowledged.
	Applied, Last uint64
	// At is when the last entry of the log was appended.
	At time.Time
	// Lost names the members that are no longer part of the cluster.
	Lost []string
}

// Recover turns the stopped node in dir into a cluster of one (decision 8). It appends to the log, in a new term, a
// configuration with this node alone and an entry that gives the cluster a new id, and keeps everything before them:
// what is not known to be committed is kept, not cut, so nothing that this node acknowledged or holds is lost.
// Nodes of the old cluster carry another cluster id and cannot rejoin by themselves. Without force it only reports.
func Recover(dir string, force bool) (RecoverReport, error) {
	return recoverDir(disk.OS(), vfs.Default, dir, force)
}

func recoverDir(fs disk.FS, store vfs.FS, dir string, force bool) (report RecoverReport, err error) {
	raw, err := readFile(fs, filepath.Join(dir, identityName))
	if err != nil {
		return report, &StartError{Kind: ErrForeign, Message: fmt.Sprintf("%s is not the data directory of a node", dir), Cause: err}
	}
	var ident identity
	if err := parseIdentity(raw, &ident); err != nil {
		return report, err
	}
	d, err := openDataDir(fs, dir, ident.Name)
	if err != nil {
		return report, err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	n := &Node{cfg: Config{Name: ident.Name, Dir: dir}, dir: d, id: d.id.id(), log: hclog.NewNullLogger()}
	w, err := wal.Open(wal.Options{Dir: d.join(walDirName), FS: fs, Prefill: -1})
	if err != nil {
		return report, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	eng, err := engine.Open(engine.Options{Dir: d.join(storeDirName), FS: store, Shard: shard})
	if err != nil {
		return report, err
	}
	defer func() { err = errors.Join(err, eng.Close()) }()
	durable := eng.Durable()
	var base hraft.Configuration
	if len(durable.Configuration) > 0 {
		base = hraft.DecodeConfiguration(durable.Configuration)
	}
	s := w.Shard(shard)
	log, err := logstore.Open(logstore.Options{WAL: w, Shard: s, Base: base, BaseIndex: durable.ConfigurationIndex})
	if err != nil {
		return report, damaged(ident.Name, err)
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	if _, err := log.Reconcile(durable.Index, durable.Term); err != nil {
		return report, damaged(ident.Name, err)
	}
	_, config := log.Configuration()
	addr := hraft.ServerAddress("")
	for _, m := range config.Servers {
		if engine.NodeID(m.ID) == n.id {
			addr = m.Address
			continue
		}
		report.Lost = append(report.Lost, nameOf(engine.NodeID(m.ID)))
	}
	report.Node, report.ClusterID = string(n.id), d.id.Cluster
	report.Applied = max(s.Committed(), durable.Index)
	var last hraft.Log
	last.Index, last.Term = durable.Index, durable.Term
	if s.Last() > 0 {
		if err := log.GetLog(s.Last(), &last); err != nil {
			return report, err
		}
	}
	report.Last, report.At = last.Index, last.AppendedAt
	report.Applied = min(report.Applied, report.Last)
	switch {
	case addr == "":
		return report, &StartError{Kind: ErrForeign, Message: fmt.Sprintf("%s is not a member of the configuration in its log", n.id),
			Remedy: "recover from another node's directory"}
	case d.id.Cluster == "":
		return report, &StartError{Kind: ErrForeign, Message: fmt.Sprintf("%s belongs to no cluster yet", dir), Remedy: "empty the directory and found a new cluster"}
	case !force:
		return report, nil
	}
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, by its contract
	next := d.id
	if next.Previous == "" {
		next.Previous = next.Cluster
	}
	next.Cluster = hex.EncodeToString(b[:])
	// The identity first: a crash after it leaves a node that nobody talks to, and on which this is repeated.
	if err := d.setIdentity(next); err != nil {
		return report, err
	}
	report.ClusterID = next.Cluster
	current, err := log.GetUint64([]byte("CurrentTerm"))
	if err != nil {
		return report, err
	}
	term := max(current, last.Term) + 1
	if err := log.SetUint64([]byte("CurrentTerm"), term); err != nil {
		return report, err
	}
	refound := &engine.Init{ClusterID: next.Cluster, Level: eng.Level(), Refound: true}
	var eb engine.EntryBuilder
	cmd := refound.AppendTo(nil)
	eb.Reset(eng.Level(), eng.Stamp(), len(cmd)+engine.EntryOverhead)
	eb.Add(0, 0, 0, cmd)
	now := time.Now()
	alone := hraft.Configuration{Servers: []hraft.Server{{ID: hraft.ServerID(n.id), Address: addr}}}
	return report, log.StoreLogs([]*hraft.Log{
		{Index: last.Index + 1, Term: term, Type: hraft.LogConfiguration, Data: hraft.EncodeConfiguration(alone), AppendedAt: now},
		{Index: last.Index + 2, Term: term, Type: hraft.LogCommand, Data: eb.Bytes(), AppendedAt: now},
	})
}
