// Package bench measures Tercet: against the disk under it, against the same engine on a stock log and
// transport (bench/baseline), and against itself under kills. `tercet bench` is its command line.
//
// The parts:
//
//   - a Workload says what is asked of the cluster, Run drives it with one Publisher per goroutine, closed loop
//     or at a fixed rate, and a Result is what came of it;
//   - publishers speak HTTP by a client that costs little (Dial), or call a node from inside its own process
//     through an Endpoint, a loopback listener that a hidden flag of the server opens;
//   - StartCluster runs three server processes in a directory of their own;
//   - Probe measures what the disk does, in the mode the write-ahead log uses, in the same minute;
//   - a Meter accounts for CPU seconds, also for those that others took meanwhile.
//
// Latencies are HdrHistograms in microseconds. At a fixed rate they count from the moment a request was due, so
// that a stall is charged to every request it held up (no coordinated omission); in a closed loop they count
// from the moment of the call.
package bench
