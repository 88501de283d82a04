package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// A setting's value comes from the first of: the command line, the environment, the configuration file,
// the default. The name is the same everywhere: flag --zone-timeout, environment TERCET_ZONE_TIMEOUT (or
// TERCET_ZONE_TIMEOUT_FILE, a file that holds the value), key zone-timeout of the file.

// overlay sets each covered flag that the command line left alone from the environment, else from the
// configuration file (none if file is empty).
func overlay(flags *pflag.FlagSet, covered func(*pflag.Flag) bool, getenv func(string) (string, bool), file string) error {
	values, err := readSettings(file)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	var problems []error
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Name == "help" || f.Name == "config" || !covered(f) {
			return
		}
		known[f.Name] = true
		if f.Changed {
			return
		}
		if err := fromEnvironment(f, getenv); err != nil {
			problems = append(problems, err)
			return
		}
		if v, ok := values[f.Name]; ok && !f.Changed {
			if err := flags.Set(f.Name, v.value); err != nil {
				problems = append(problems, fmt.Errorf("%s:%d: %s: %w", file, v.line, f.Name, errors.Unwrap(err)))
			}
		}
	})
	for _, v := range values {
		if !known[v.key] {
			problems = append(problems, fmt.Errorf("%s:%d: unknown key %q", file, v.line, v.key))
		}
	}
	return errors.Join(problems...)
}

// fromEnvironment sets f from the environment unless the command line did.
func fromEnvironment(f *pflag.Flag, getenv func(string) (string, bool)) error {
	if f.Changed {
		return nil
	}
	name := environmentName(f.Name)
	value, ok := getenv(name)
	if path, ok2 := getenv(name + "_FILE"); ok2 {
		if ok {
			return fmt.Errorf("%s and %s_FILE are both set", name, name)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("%s_FILE: %w", name, err)
		}
		value, ok = strings.TrimRight(string(content), "\r\n"), true
	}
	if !ok {
		return nil
	}
	if err := f.Value.Set(value); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	f.Changed = true
	return nil
}

// environmentName is the variable of a flag.
func environmentName(flag string) string {
	return "TERCET_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// setting is one key of the configuration file.
type setting struct {
	key, value string
	line       int
}

// readSettings reads a configuration file: one mapping of flag names to scalars or lists of scalars.
func readSettings(file string) (map[string]setting, error) {
	if file == "" {
		return nil, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var doc yaml.Node
	if err := yaml.NewDecoder(f).Decode(&doc); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(doc.Content) == 0 {
		return nil, nil
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		return nil, fmt.Errorf("%s:%d: want a mapping of settings", file, root.Line)
	}
	values := map[string]setting{}
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, node := root.Content[i], root.Content[i+1]
		if _, ok := values[key.Value]; ok {
			return nil, fmt.Errorf("%s:%d: key %q stands twice", file, key.Line, key.Value)
		}
		if key.Value == authKey {
			continue // see readAuth
		}
		value, err := settingValue(node)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %s: %w", file, node.Line, key.Value, err)
		}
		values[key.Value] = setting{key.Value, value, key.Line}
	}
	return values, nil
}

// settingValue is a node's text as the flag of its name reads it.
func settingValue(node *yaml.Node) (string, error) {
	switch {
	case node.Kind == yaml.ScalarNode && node.Tag != "!!null":
		return node.Value, nil
	case node.Kind == yaml.SequenceNode:
		items := make([]string, len(node.Content))
		for i, item := range node.Content {
			if item.Kind != yaml.ScalarNode {
				return "", errors.New("want a list of plain values")
			}
			items[i] = item.Value
		}
		return strings.Join(items, ","), nil
	}
	return "", errors.New("want a plain value or a list")
}

// byteSize is a flag of a number of bytes: 1048576, 64MiB, 1GiB, 500MB.
type byteSize int64

var byteUnits = []struct {
	suffix string
	factor int64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1},
}

// String implements pflag.Value with the largest binary unit that divides the size.
func (b *byteSize) String() string {
	n := int64(*b)
	for i := 3; i >= 0; i-- {
		if u := byteUnits[i]; n != 0 && n%u.factor == 0 {
			return strconv.FormatInt(n/u.factor, 10) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10)
}

// Type implements pflag.Value.
func (*byteSize) Type() string { return "bytes" }

// Set implements pflag.Value.
func (b *byteSize) Set(s string) error {
	number, factor := s, int64(1)
	for _, u := range byteUnits {
		if rest, ok := strings.CutSuffix(s, u.suffix); ok {
			number, factor = strings.TrimSpace(rest), u.factor
			break
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 0 || n > (1<<62)/factor {
		return fmt.Errorf("%q is not a size such as 67108864 or 64MiB", s)
	}
	*b = byteSize(n * factor)
	return nil
}
