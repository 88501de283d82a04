// Package harness runs real tercet processes for tests: it builds the binary once, starts clusters of three
// nodes on free loopback ports with data directories of their own, breaks them (kill, stop, pause, wipe, fill
// the disk), and waits for conditions.
//
// Nothing here sleeps to be on the safe side. [Until] polls a condition against a deadline and says what the
// condition last looked like when it fails.
//
// No process outlives the test binary: each child has the kernel's parent-death signal set and is killed by
// its process id when the test that started it ends. When a test failed, the end of each node's log is
// printed.
//
// The package speaks to nodes only through what docs and specifications promise (flags, signals, HTTP), so
// that a test is evidence about the product and not about its insides.
package harness
