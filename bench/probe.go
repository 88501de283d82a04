package bench

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"

	"tercet.dev/tercet/wal/disk"
)

// ProbeOptions says what Probe measures.
type ProbeOptions struct {
	// Dir is where the files are made; they are removed afterwards.
	Dir string
	// Direct writes with O_DIRECT and O_DSYNC, else through the page cache with fdatasync.
	Direct bool
	// Prefilled overwrites blocks that have been written before, as the write-ahead log does. Otherwise each
	// write makes the file longer.
	Prefilled bool
	// Size is the bytes written between two syncs, rounded up to whole blocks.
	Size int64
	// Streams is the number of files written and synced at the same time.
	Streams int
	// Duration is how long to measure.
	Duration time.Duration
	// Delay is added to each sync (see disk.WithSyncDelay).
	Delay time.Duration
}

// ProbeResult is what the disk did.
type ProbeResult struct {
	Mode      string `json:"mode"`
	Prefilled bool   `json:"prefilled"`
	Size      int64  `json:"size"`
	Streams   int    `json:"streams"`
	// Sync is the time from the begin of a write to the end of its sync.
	Sync Percentiles `json:"sync"`
	// SyncsPerSecond and BytesPerSecond are per stream.
	SyncsPerSecond float64 `json:"syncsPerSecond"`
	BytesPerSecond float64 `json:"bytesPerSecond"`
	// CPUPerSync is CPU time of this process, in microseconds.
	CPUPerSync float64 `json:"cpuPerSyncUs"`
}

// Median returns the middle time of a sync.
func (r ProbeResult) Median() time.Duration { return time.Duration(r.Sync.P50) * time.Microsecond }

// String is the label of the probe: "direct 64 KiB × 3".
func (r ProbeResult) String() string {
	prefilled := ", prefilled"
	if !r.Prefilled {
		prefilled = ", growing"
	}
	return fmt.Sprintf("%s × %d, %s%s", FormatBytes(r.Size), r.Streams, r.Mode, prefilled)
}

// DirectWorks reports which mode the write-ahead log takes for files in dir.
func DirectWorks(dir string) bool { return disk.OS().DirectWorks(dir) }

// The space one stream of a probe cycles through: enough to not rewrite the same blocks at once, small enough to
// be prefilled in no time.
const (
	probeSpanMin = 16 << 20
	probeSpanMax = 256 << 20
)

// Probe writes and syncs as the options say, and nothing else.
func Probe(ctx context.Context, o ProbeOptions) (ProbeResult, error) {
	mode := disk.Buffered
	if o.Direct {
		mode = disk.Direct
	}
	size := max(disk.BlockSize, disk.AlignUp(o.Size))
	r := ProbeResult{Mode: "fdatasync", Prefilled: o.Prefilled, Size: size, Streams: max(1, o.Streams)}
	if o.Direct {
		r.Mode = "direct"
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return r, err
	}
	dir, err := os.MkdirTemp(o.Dir, "probe-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)

	fsys := disk.WithSyncDelay(disk.OS(), o.Delay)
	span := min(probeSpanMax, max(probeSpanMin, 32*size)) / size * size
	body := disk.Aligned(int(size))
	copy(body, newBodies(uint64(size)).next(int(size)))
	files := make([]disk.File, r.Streams)
	for i := range files {
		// Prefilled without the emulated delay, which would only take time.
		name := filepath.Join(dir, fmt.Sprintf("stream-%d", i))
		if err := prepareProbeFile(name, body, span, o.Prefilled); err != nil {
			return r, err
		}
		if files[i], err = fsys.Open(name, mode); err != nil {
			return r, err
		}
		defer files[i].Close()
	}

	hist := NewHistogram()
	counts := make([]int64, r.Streams)
	before, err := ReadProcess(os.Getpid())
	if err != nil {
		return r, err
	}
	start := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	for i, f := range files {
		group.Go(func() error {
			n, err := probeStream(ctx, f, body, span, start.Add(o.Duration), o.Prefilled, hist)
			counts[i] = n
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return r, err
	}
	elapsed := time.Since(start).Seconds()
	after, err := ReadProcess(os.Getpid())
	if err != nil {
		return r, err
	}
	var syncs int64
	for _, n := range counts {
		syncs += n
	}
	r.Sync = hist.Percentiles()
	if syncs > 0 {
		r.SyncsPerSecond = float64(syncs) / float64(r.Streams) / elapsed
		r.BytesPerSecond = r.SyncsPerSecond * float64(size)
		r.CPUPerSync = float64(after.Sub(before).CPU().Microseconds()) / float64(syncs)
	}
	return r, nil
}

func prepareProbeFile(name string, body []byte, span int64, prefilled bool) error {
	f, err := disk.OS().Create(name, disk.Buffered)
	if err != nil {
		return err
	}
	defer f.Close()
	if !prefilled {
		return nil
	}
	for off := int64(0); off < span; off += int64(len(body)) {
		if _, err := f.WriteAt(body, off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// probeStream writes and syncs one file until the deadline, but once at least.
func probeStream(ctx context.Context, f disk.File, body []byte, span int64, deadline time.Time, wrap bool, hist *Histogram) (int64, error) {
	rec := recorder{to: hist}
	defer rec.flush()
	var n, off int64
	for at := time.Now(); (n == 0 || at.Before(deadline)) && ctx.Err() == nil; n++ {
		if _, err := f.WriteAt(body, off); err != nil {
			return n, err
		}
		if err := f.Sync(); err != nil {
			return n, err
		}
		now := time.Now()
		rec.record(now.Sub(at))
		at = now
		off += int64(len(body))
		if wrap && off >= span {
			off = 0
		}
	}
	return n, ctx.Err()
}

// ProbeTable writes results as a table.
func ProbeTable(w io.Writer, results []ProbeResult) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "size\tstreams\tmode\tblocks\tp50 ms\tp99 ms\tmax ms\tsyncs/s a stream\tbytes/s a stream\tCPU µs a sync\t")
	for _, r := range results {
		blocks := "prefilled"
		if !r.Prefilled {
			blocks = "growing"
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%.0f\t\n", FormatBytes(r.Size), r.Streams, r.Mode, blocks,
			formatMillis(r.Sync.P50), formatMillis(r.Sync.P99), formatMillis(r.Sync.Max), FormatCount(r.SyncsPerSecond),
			FormatBytes(int64(r.BytesPerSecond)), r.CPUPerSync)
	}
	return t.Flush()
}
