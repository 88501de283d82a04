package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

// settingsOf overlays a small flag set and returns it with the error.
func settingsOf(t *testing.T, args []string, env map[string]string, file string) (*pflag.FlagSet, error) {
	t.Helper()
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	flags.String("zone", "default-zone", "")
	flags.Duration("zone-timeout", 2*time.Second, "")
	flags.StringSlice("peers", nil, "")
	flags.Bool("insecure", false, "")
	reserve := byteSize(1 << 30)
	flags.Var(&reserve, "disk-reserve", "")
	flags.String("once", "", "")
	flags.String("config", "", "")
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	path := ""
	if file != "" {
		path = filepath.Join(t.TempDir(), "tercet.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	getenv := func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	covered := func(f *pflag.Flag) bool { return f.Name != "once" }
	err := overlay(flags, covered, getenv, path)
	return flags, err
}

func TestSettingsPrecedence(t *testing.T) {
	env := map[string]string{"TERCET_ZONE": "from-env", "TERCET_ZONE_TIMEOUT": "3s", "TERCET_ONCE": "ignored"}
	file := "zone: from-file\nzone-timeout: 4s\npeers: [n1=a:1, n2=b:2]\ninsecure: true\ndisk-reserve: 64MiB\n"
	flags, err := settingsOf(t, []string{"--zone", "from-flag"}, env, file)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"zone":         "from-flag",
		"zone-timeout": "3s",
		"peers":        "[n1=a:1,n2=b:2]",
		"insecure":     "true",
		"disk-reserve": "64MiB",
		"once":         "",
	} {
		if got := flags.Lookup(name).Value.String(); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
}

func TestSettingsFromSecretFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte("zone-x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	flags, err := settingsOf(t, nil, map[string]string{"TERCET_ZONE_FILE": path}, "")
	if err != nil {
		t.Fatal(err)
	}
	if got := flags.Lookup("zone").Value.String(); got != "zone-x" {
		t.Errorf("zone = %q", got)
	}
	if _, err := settingsOf(t, nil, map[string]string{"TERCET_ZONE_FILE": path, "TERCET_ZONE": "b"}, ""); err == nil {
		t.Error("a value given twice was accepted")
	}
}

func TestSettingsErrorsNameTheirPlace(t *testing.T) {
	for _, c := range []struct{ name, file, want string }{
		{"unknown key", "zone: a\nzone-timout: 4s\n", `tercet.yaml:2: unknown key "zone-timout"`},
		{"not covered", "once: a\n", `tercet.yaml:1: unknown key "once"`},
		{"bad value", "zone: a\n\nzone-timeout: soon\n", "tercet.yaml:3: zone-timeout:"},
		{"bad size", "disk-reserve: 64QiB\n", "tercet.yaml:1: disk-reserve:"},
		{"nested", "zone:\n  name: a\n", "tercet.yaml:2: zone: want a plain value"},
		{"null", "zone:\n", "tercet.yaml:1: zone: want a plain value"},
		{"twice", "zone: a\nzone: b\n", `tercet.yaml:2: key "zone" stands twice`},
		{"no mapping", "- a\n", "tercet.yaml:1: want a mapping"},
		{"no yaml", "zone: [a\n", "tercet.yaml: yaml:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := settingsOf(t, nil, nil, c.file)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
	_, err := settingsOf(t, nil, map[string]string{"TERCET_ZONE_TIMEOUT": "soon"}, "")
	if err == nil || !strings.Contains(err.Error(), "TERCET_ZONE_TIMEOUT:") {
		t.Errorf("environment error %v", err)
	}
}

func TestByteSize(t *testing.T) {
	for in, want := range map[string]string{
		"0": "0", "1048576": "1MiB", "64MiB": "64MiB", "1GiB": "1GiB", "500MB": "500000000", "1536KiB": "1536KiB",
	} {
		var b byteSize
		if err := b.Set(in); err != nil {
			t.Errorf("%q: %v", in, err)
		}
		if b.String() != want {
			t.Errorf("%q reads as %s, want %s", in, b.String(), want)
		}
	}
	for _, in := range []string{"", "-1", "1.5GiB", "GiB", "9999999TiB", "1 G"} {
		var b byteSize
		if b.Set(in) == nil {
			t.Errorf("%q was accepted as %d", in, b)
		}
	}
}

// FuzzSettings feeds arbitrary configuration files: no panic, and an error names the file.
func FuzzSettings(f *testing.F) {
	f.Add("zone: a\npeers: [x, y]\n")
	f.Add("zone: &a b\npeers: *a\n")
	f.Add("? [a]\n: b\n")
	f.Fuzz(func(t *testing.T, content string) {
		path := filepath.Join(t.TempDir(), "f.yaml")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readSettings(path); err != nil && !strings.Contains(err.Error(), "f.yaml") {
			t.Errorf("error without a place: %v", err)
		}
	})
}
