package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// build is what `tercet version` prints.
type build struct {
	Version  string `json:"version"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
	Raft     string `json:"raft"`
	Pebble   string `json:"pebble"`
}

func thisBuild() build {
	b := build{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			switch m.Path {
			case "github.com/hashicorp/raft":
				b.Raft = m.Version
			case "github.com/cockroachdb/pebble/v2":
				b.Pebble = m.Version
			}
		}
	}
	return b
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version of this binary",
		GroupID: groupDiagnose,
		Example: examples(`
			tercet version
			tercet version -o json
			tercet version -o json | jq -r .version`),
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			b := thisBuild()
			return a.print(b, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "tercet %s (%s, %s)\n", b.Version, b.Go, b.Platform)
				return err
			})
		},
	}
}
