package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"tercet.dev/tercet/test/harness"
)

// TestCommands runs the scripts in testdata/script against a real cluster: what the README shows, and what scripts
// rely on. Each gets the addresses of the nodes in its environment ($LEADER, $FOLLOWER, $TERCET_SERVER) and a
// topic name of its own in $TOPIC.
func TestCommands(t *testing.T) {
	c := harness.Start(t, harness.Options{})
	followers, leader := c.Followers()
	bin := t.TempDir()
	if err := os.Symlink(harness.Binary(t), filepath.Join(bin, "tercet")); err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", bin+string(os.PathListSeparator)+env.Getenv("PATH"))
			env.Setenv("LEADER", leader.URL())
			env.Setenv("FOLLOWER", followers[0].URL())
			env.Setenv("LEADER_ID", leader.ID)
			env.Setenv("FOLLOWER_ID", followers[0].ID)
			env.Setenv("TERCET_SERVER", followers[0].URL()+","+leader.URL()+","+followers[1].URL())
			env.Setenv("TOPIC", filepath.Base(env.WorkDir))
			return nil
		},
	})
}
