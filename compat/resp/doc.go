// Package resp reads the commands of Valkey clients and writes replies to them, in RESP2 and RESP3.
//
// A Reader turns bytes into commands without copying them: the arguments it returns lie in its buffer and are good
// until the next call. Nothing is allocated for a number that a client sends, only for bytes that have arrived. A
// Buffer collects replies.
//
// Protocol errors have Valkey's words. Where Valkey lets something pass that no client means (a bulk string that
// does not end in CR LF), this package does not.
package resp
