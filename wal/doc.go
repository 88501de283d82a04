// Package wal is Tercet's write-ahead log: one stream per node for all shards, with group commit.
package wal
