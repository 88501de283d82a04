// Package timerslack saves what the Go runtime's monitor thread costs a process whose threads wait for the disk.
//
// While goroutines are in system calls that take long, such as writes that wait for the disk, the monitor looks after
// them every 20 µs, which Linux's timer slack of 50 µs makes 70. On a virtual machine every look is a timer interrupt
// and takes some 10 µs: a tenth of a core for each process that syncs all the time. With a slack of 500 µs it takes a
// fifth less CPU time to publish a message on three nodes of one machine. What the slack delays otherwise are sleeps
// and time-outs, which Go does not keep to less than a millisecond anyway.
package timerslack

import "time"

// Wide is the slack that Widen gives.
const Wide = 500 * time.Microsecond
