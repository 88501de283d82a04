// Package compat is the Valkey front end: it answers RESP2 and RESP3 on a port of its own, and turns stream, key and string
// commands into engine commands and queries for a Backend (a *raft.Node). Subpackage resp has the protocol, command the
// catalogue of commands, acl the users. DESIGN.md says how it works and why.
package compat
