package harness

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// TestPowerCut shows that the fault is what it says: synced bytes are there afterwards, others are not.
func TestPowerCut(t *testing.T) {
	fs := MountExt4(t, 32<<20)
	write := func(name string, sync bool) {
		f, err := os.Create(filepath.Join(fs.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.Write(bytes.Repeat([]byte{7}, 100_000)); err != nil {
			t.Fatal(err)
		}
		if sync {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	write("synced", true)
	write("unsynced", false)
	fs.CutPower()
	fs.Restore()
	if b, err := os.ReadFile(filepath.Join(fs.Dir, "synced")); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{7}, 100_000)) {
		t.Errorf("the synced file has %d bytes after the power cut: %v", len(b), err)
	}
	if b, err := os.ReadFile(filepath.Join(fs.Dir, "unsynced")); err == nil && bytes.Contains(b, []byte{7}) {
		t.Error("the unsynced file survived the power cut: the fault shows nothing")
	}
}

func TestFill(t *testing.T) {
	fs := MountSmall(t, 64<<20)
	before := fs.Free()
	giveBack := fs.Fill(8 << 20)
	if free := fs.Free(); free > 9<<20 || free < 6<<20 {
		t.Errorf("%d bytes are free, want about 8 MiB", free)
	}
	giveBack()
	if free := fs.Free(); free < before-1<<20 {
		t.Errorf("%d bytes are free again, want %d", free, before)
	}
}
