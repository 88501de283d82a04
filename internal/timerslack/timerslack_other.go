//go:build !linux

package timerslack

// Widen does nothing: only Linux has a timer slack.
func Widen() {}
