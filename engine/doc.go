// Package engine is Tercet's deterministic state machine: topics, consumer groups, leases.
package engine
