package wire

// ACLUsers is the answer to GET /v1/acl/users.
type ACLUsers struct {
	Users []ACLUser `json:"users"`
}

// ACLUser is a user of the Valkey port.
type ACLUser struct {
	Name string `json:"name"`
	// Rules make the user out of one that is off and may do nothing. Passwords show as their SHA-256.
	Rules []string `json:"rules"`
}

// ACLRules is the body of PUT /v1/acl/users/{name}.
type ACLRules struct {
	Rules []string `json:"rules"`
}
