// Command fileindex prints one line of JSON per file below the directories it is given: path, size and hash. It makes
// real input for `tercet send --jsonl`.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// file is one line of the output.
type file struct {
	Path   string `json:"path"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

func main() {
	if err := index(os.Stdout, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "fileindex:", err)
		os.Exit(1)
	}
}

func index(w io.Writer, roots []string) error {
	out := bufio.NewWriter(w)
	enc := json.NewEncoder(out)
	for _, root := range roots {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			line := file{Path: path}
			if line.Size, line.SHA256, err = digest(path); err != nil {
				return err
			}
			return enc.Encode(line)
		})
		if err != nil {
			return err
		}
	}
	return out.Flush()
}

func digest(path string) (size int64, sum string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	h := sha256.New()
	if size, err = io.Copy(h, f); err != nil {
		return 0, "", err
	}
	return size, hex.EncodeToString(h.Sum(nil)), nil
}
