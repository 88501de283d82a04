// Package wal is Tercet's write-ahead log: one stream per node for all shards, with group commit.
//
// There are five nouns. The log is a stream of records. A shard is one consensus group's log of entries in that
// stream, with a few stable values beside it. A batch is what one write and one sync bring to disk. A segment is a
// file of fixed size that holds batches; segments are filled with zeros before their first use and recycled after
// their last. A position in the stream is an LSN: what lies before Durable() is on disk, what lies before Written()
// has been appended.
//
// Appending never waits for the disk. Who needs durability waits for the LSN that the append returned; while one batch
// is being synced, the next one fills. Damage is told from a torn write, since each batch is written only after the one
// before it was synced: a readable batch behind something unreadable proves that this had been synced, and is damaged.
//
// DESIGN.md has the format, the invariants by number, and a crash argument for each operation.
package wal
