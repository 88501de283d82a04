// Package engine is Tercet's deterministic state machine: topics, consumer groups, leases.
//
// It is given committed log entries and turns them into state and results; the same entries give the same
// state and results on every node, after any crash and from any checkpoint. It has no goroutine, clock or
// randomness of its own, and no I/O besides the Pebble store beneath it. Time comes with the entries.
//
//	topic   a log of messages with dense offsets and rising stream IDs, stored in blocks: what one entry
//	        brought to it
//	group   a position in a topic, and the unsettled set: all that was given to the group and is not done
//	lease   one message of the set, given to a consumer until a deadline; its receipt names the grant
//	intake  one node's numbered commands with their results, so that a command of unknown outcome can be
//	        proposed again and is done once
//
// A caller feeds Apply, ApplyConfiguration and ApplyEmpty from one goroutine in log order. Everything else
// may be called from any goroutine. After a crash Open gives the state of the last checkpoint, and the caller
// applies the log from there; entries that are already in are skipped. An error of Apply is for good: a node
// that cannot follow the log must stop.
//
// What changes lives in memory and reaches the disk in checkpoints; what never changes is written when it is
// applied. DESIGN.md says why that is right after a crash, and numbers the invariants that comments refer to.
package engine
