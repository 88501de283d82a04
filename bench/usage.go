package bench

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// clockTick is the unit of the CPU times in /proc: USER_HZ, which is 100 on every architecture Linux has.
const clockTick = 10 * time.Millisecond

// ProcessUsage is what a process has used so far.
type ProcessUsage struct {
	// User and System are CPU time, of all threads.
	User   time.Duration `json:"user"`
	System time.Duration `json:"system"`
	// Written is what the process caused to be sent to the disk, in bytes.
	Written int64 `json:"written"`
	// RSS is the memory it holds at the moment, in bytes.
	RSS int64 `json:"rss"`
}

// CPU is user and system time together.
func (u ProcessUsage) CPU() time.Duration { return u.User + u.System }

// Sub returns what was used since earlier. RSS stays the present one.
func (u ProcessUsage) Sub(earlier ProcessUsage) ProcessUsage {
	u.User -= earlier.User
	u.System -= earlier.System
	u.Written -= earlier.Written
	return u
}

// ReadProcess reads a process's usage from /proc.
func ReadProcess(pid int) (ProcessUsage, error) {
	dir := "/proc/" + strconv.Itoa(pid)
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return ProcessUsage{}, err
	}
	u, err := parseProcessStat(stat)
	if err != nil {
		return u, fmt.Errorf("%s/stat: %w", dir, err)
	}
	u.RSS *= int64(os.Getpagesize())
	// Not every container lets it be read; then the figure is left out.
	if io, err := os.ReadFile(dir + "/io"); err == nil {
		u.Written = parseProcessIO(io)
	}
	return u, nil
}

// parseProcessStat reads /proc/PID/stat. RSS is in pages.
func parseProcessStat(stat []byte) (ProcessUsage, error) {
	// The second field is the command in parentheses, which may itself hold spaces and parentheses.
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return ProcessUsage{}, errors.New("no command field")
	}
	fields := bytes.Fields(stat[end+1:])
	const user, system, rss = 14 - 3, 15 - 3, 24 - 3 // numbered from 1 in proc(5), the first behind the command is 3
	if len(fields) <= rss {
		return ProcessUsage{}, fmt.Errorf("%d fields", len(fields)+2)
	}
	var values [3]int64
	for i, at := range []int{user, system, rss} {
		v, err := strconv.ParseInt(string(fields[at]), 10, 64)
		if err != nil {
			return ProcessUsage{}, err
		}
		values[i] = v
	}
	return ProcessUsage{
		User: time.Duration(values[0]) * clockTick, System: time.Duration(values[1]) * clockTick, RSS: values[2],
	}, nil
}

// parseProcessIO reads write_bytes of /proc/PID/io.
func parseProcessIO(text []byte) int64 {
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "write_bytes:"); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			return n
		}
	}
	return 0
}

// MachineUsage is what all CPUs together have done since the machine started.
type MachineUsage struct {
	// Busy is time spent for processes and for the kernel, Stolen what the hypervisor gave to other machines.
	Busy   time.Duration
	Stolen time.Duration
}

// Sub returns what was used since earlier.
func (m MachineUsage) Sub(earlier MachineUsage) MachineUsage {
	return MachineUsage{Busy: m.Busy - earlier.Busy, Stolen: m.Stolen - earlier.Stolen}
}

// ReadMachine reads /proc/stat.
func ReadMachine() (MachineUsage, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return MachineUsage{}, err
	}
	return parseMachineStat(text)
}

func parseMachineStat(text []byte) (MachineUsage, error) {
	line, _, _ := bytes.Cut(text, []byte("\n"))
	fields := bytes.Fields(line)
	// cpu user nice system idle iowait irq softirq steal guest guest_nice; guests are part of user and nice.
	if len(fields) < 9 || string(fields[0]) != "cpu" {
		return MachineUsage{}, errors.New("/proc/stat: no cpu line")
	}
	var ticks [8]int64
	for i := range ticks {
		v, err := strconv.ParseInt(string(fields[i+1]), 10, 64)
		if err != nil {
			return MachineUsage{}, fmt.Errorf("/proc/stat: %w", err)
		}
		ticks[i] = v
	}
	busy := ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]
	return MachineUsage{Busy: time.Duration(busy) * clockTick, Stolen: time.Duration(ticks[7]) * clockTick}, nil
}

// Meter accounts for the CPU time of a run: of named processes, of this one, and of what was lost to others.
type Meter struct {
	pids    map[string]int
	at      time.Time
	machine MachineUsage
	self    ProcessUsage
	process map[string]ProcessUsage
}

// StartMeter begins to account for this process and those given by name.
func StartMeter(pids map[string]int) (*Meter, error) {
	m := &Meter{pids: pids}
	err := m.read()
	return m, err
}

func (m *Meter) read() error {
	var err error
	m.at = time.Now()
	if m.machine, err = ReadMachine(); err != nil {
		return err
	}
	if m.self, err = ReadProcess(os.Getpid()); err != nil {
		return err
	}
	m.process = make(map[string]ProcessUsage, len(m.pids))
	for name, pid := range m.pids {
		// A process that is gone used nothing more; kill runs end with one less.
		m.process[name], _ = ReadProcess(pid)
	}
	return nil
}

// CPUReport is what a Meter saw.
type CPUReport struct {
	// Elapsed is the wall time it covers.
	Elapsed time.Duration `json:"elapsed"`
	// Processes is the usage of the named processes, Client that of the one that measures.
	Processes map[string]ProcessUsage `json:"processes"`
	Client    ProcessUsage            `json:"client"`
	// Others is CPU time that other programs on the machine took, Stolen what the hypervisor took.
	Others time.Duration `json:"others"`
	Stolen time.Duration `json:"stolen"`
}

// LostCores is how many CPUs were not to be had on average.
func (r CPUReport) LostCores() float64 {
	if r.Elapsed <= 0 {
		return 0
	}
	return float64(r.Others+r.Stolen) / float64(r.Elapsed)
}

// Servers is the CPU time of the named processes together.
func (r CPUReport) Servers() (sum time.Duration) {
	for _, u := range r.Processes {
		sum += u.CPU()
	}
	return sum
}

// Stop ends the account.
func (m *Meter) Stop() (CPUReport, error) {
	end := Meter{pids: m.pids}
	if err := end.read(); err != nil {
		return CPUReport{}, err
	}
	r := CPUReport{Elapsed: end.at.Sub(m.at), Processes: map[string]ProcessUsage{}, Client: end.self.Sub(m.self)}
	own := r.Client.CPU()
	for name, u := range end.process {
		if u == (ProcessUsage{}) {
			u = m.process[name]
		}
		r.Processes[name] = u.Sub(m.process[name])
		own += r.Processes[name].CPU()
	}
	machine := end.machine.Sub(m.machine)
	// Each of the readings is rounded to a tick, so that the difference may fall below nothing.
	r.Others = max(0, machine.Busy-own)
	r.Stolen = machine.Stolen
	return r, nil
}
