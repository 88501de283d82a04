package disk

import "time"

// WithSyncDelay returns fs with every File.Sync taking delay longer: a slower disk for benchmarks, on which the
// number of syncs in a path shows. Writes of Direct files count as unsynced until the delayed Sync as far as a
// caller can tell, since it has to call Sync anyway.
func WithSyncDelay(fs FS, delay time.Duration) FS {
	if delay <= 0 {
		return fs
	}
	return &delayFS{FS: fs, delay: delay}
}

type delayFS struct {
	FS
	delay time.Duration
}

func (d *delayFS) Create(name string, mode Mode) (File, error) {
	return d.wrap(d.FS.Create(name, mode))
}

func (d *delayFS) Open(name string, mode Mode) (File, error) { return d.wrap(d.FS.Open(name, mode)) }

func (d *delayFS) wrap(f File, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	return &delayFile{File: f, delay: d.delay}, nil
}

type delayFile struct {
	File
	delay time.Duration
}

func (f *delayFile) Sync() error {
	time.Sleep(f.delay)
	return f.File.Sync()
}
