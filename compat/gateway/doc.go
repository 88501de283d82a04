// Package gateway serves the queue protocol with the streams of a Valkey, Redis or ElastiCache server as the store.
// There is no Tercet cluster behind it: a Gateway is a server.Backend whose state is upstream alone, so that any
// number of gateway processes can run side by side.
//
// What the upstream cannot promise is not promised: Probe finds out what a publish is worth there, and each answer
// says it.
package gateway
