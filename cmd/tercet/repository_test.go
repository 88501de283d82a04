package main

import (
	"os"
	"regexp"
	"slices"
	"testing"
)

// TestDependenciesAreDocumented compares go.mod's direct requirements with docs/dependencies.md.
func TestDependenciesAreDocumented(t *testing.T) {
	mod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("../../docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	required := submatches(regexp.MustCompile(`(?m)^\t(\S+) v\S+$`), mod)
	documented := submatches(regexp.MustCompile("(?m)^\\| `([^`]+)` \\|"), doc)
	if len(required) < 10 {
		t.Fatalf("found only %d requirements in go.mod", len(required))
	}
	slices.Sort(required)
	slices.Sort(documented)
	if !slices.Equal(required, documented) {
		t.Errorf("go.mod requires\n%v\ndocs/dependencies.md explains\n%v", required, documented)
	}
}

func submatches(re *regexp.Regexp, text []byte) []string {
	var all []string
	for _, m := range re.FindAllSubmatch(text, -1) {
		all = append(all, string(m[1]))
	}
	return all
}
