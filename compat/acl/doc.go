// Package acl decides which Valkey user may run which command on which keys and channels.
//
// A User is made of rules in Valkey's words (`on >password ~orders:* +@stream -xtrim`). Users do not change: Set makes a
// changed copy, so that a connection can hold one without a lock. A Store holds the users by name.
package acl
